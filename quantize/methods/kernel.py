"""The compiled CPU kernel of :mod:`quantize.methods.columns`; its grid is that of :mod:`quantize.methods.grid`.

Functions stand at module level, where numba's cache on disk finds them again in the next process.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from quantize.methods.grid import HALF_MAX, HALF_TINY, MSE_NORM, MSE_SHRINK, MSE_STEPS

LANES = 64  # rows walked together: enough to fill the vector units, few enough to stay in the nearest cache
TRIALS = int(MSE_SHRINK * MSE_STEPS)


@numba.njit(inline="always", cache=True)
def _half(value):
    """Rounded to float16, ties to even, in the wider dtype."""
    if not value > 0:
        return value - value + 1
    if value > HALF_MAX:
        return value - value + HALF_MAX
    _, exponent = math.frexp(value)
    quantum = math.ldexp(1.0, max(exponent - 11, -24))
    return max(np.rint(value / quantum) * quantum, HALF_TINY)


@numba.njit(cache=True)
def _between(low, high, top, sym):
    if sym:
        return _half(2 * max(-low, high) / top), (top + 1) // 2
    scale = _half((high - low) / top)
    zero = min(max(np.rint(-low / scale), 0), top)
    if zero < 1:
        return _half(high / (top - 1)), top - top + 1
    return scale, zero


@numba.njit(cache=True)
def _fit(group, top, sym, mse, as_weight):
    low, high = min(group[0], as_weight), max(group[0], as_weight)
    for value in group:
        low, high = min(low, value), max(high, value)
    scale, zero = _between(low, high, top, sym)
    if not mse:
        return scale, zero
    best = math.inf
    chosen_scale, chosen_zero = scale, zero
    for step in range(TRIALS):
        shrink = 1 - step / MSE_STEPS
        trial, origin = _between(low * shrink, high * shrink, top, sym)
        error = 0.0
        for value in group:
            code = min(max(np.rint(value / trial) + origin, 0), top)
            error += abs(trial * (code - origin) - value) ** MSE_NORM
            if error >= best:
                break
        if error < best:
            best, chosen_scale, chosen_zero = error, trial, origin
    return chosen_scale, chosen_zero


@numba.njit(parallel=True, cache=True, error_model="numpy")
def round_columns(
    original, work, upper, order, groups, sizes, scales, zeros,
    tops, flags, codes, errors, squares, spread, first, last,
):  # fmt: skip
    variants, rows, _ = work.shape
    length = last - first
    tiles = (rows + LANES - 1) // LANES
    for tile in numba.prange(variants * tiles):
        variant = tile // tiles
        row = (tile % tiles) * LANES
        count = min(LANES, rows - row)
        top, size = tops[variant], sizes[variant]
        floor = top - top  # zero in the weight's dtype: a literal would widen every sum to float64
        # the run's columns of a few rows, turned so that one column's rows lie side by side for the vector units
        block = np.zeros((length, LANES), work.dtype)
        for lane in range(count):
            for column in range(length):
                block[column, lane] = work[variant, row + lane, first + column]
        scale, zero = np.ones(LANES, work.dtype), np.zeros(LANES, work.dtype)
        error, code = np.zeros(LANES, work.dtype), np.zeros(LANES, work.dtype)
        difference = np.zeros(LANES, work.dtype)
        square, apart = np.zeros(LANES), np.zeros(LANES)
        for column in range(length):
            place = first + column
            group = groups[variant, place]
            if size > 0 and place % size == 0:
                for lane in range(count):
                    inside = column + size <= length
                    members = (
                        block[column : column + size, lane]
                        if inside
                        else work[variant, row + lane, place : place + size]
                    )
                    fitted = _fit(members, top, flags[variant, 0], flags[variant, 1], floor)
                    scales[variant, group, row + lane] = fitted[0]
                    zeros[variant, group, row + lane] = fitted[1]
            for lane in range(count):
                scale[lane] = scales[variant, group, row + lane]
                zero[lane] = zeros[variant, group, row + lane]
            diagonal = upper[place, place]
            for lane in range(LANES):
                weight = block[column, lane]
                rounded = min(max(np.rint(weight / scale[lane]) + zero[lane], floor), top)
                value = scale[lane] * (rounded - zero[lane])
                code[lane] = rounded
                error[lane] = (weight - value) / diagonal
                difference[lane] = value
            natural = order[place]
            for lane in range(count):
                codes[variant, row + lane, natural] = np.uint8(code[lane])
                errors[variant, row + lane, column] = error[lane]
                square[lane] += np.float64(error[lane]) * error[lane]
                away = np.float64(original[row + lane, place]) - difference[lane]
                apart[lane] += away * away
            for later in range(column + 1, length):
                factor = upper[place, first + later]
                for lane in range(LANES):
                    block[later, lane] -= error[lane] * factor
        for lane in range(count):
            squares[variant, row + lane] += square[lane]
            spread[variant, row + lane] += apart[lane]
