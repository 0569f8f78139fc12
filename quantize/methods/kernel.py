"""The compiled CPU kernel of :mod:`quantize.methods.columns`, on the grid of :mod:`quantize.methods.grid`.

Functions are at module level, so that numba's disk cache serves later processes.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from quantize.methods.grid import HALF_MAX, HALF_TINY

Floats = NDArray[np.float32] | NDArray[np.float64]  # of the weight's dtype, as are the scalars
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

LANES = 64  # rows processed together: enough to fill the vector units, few enough to stay in the L1 cache


@numba.njit(inline="always", cache=True)
def _half(value: float) -> float:
    """Round to float16, ties to even; the result has the input's dtype."""
    if not value > 0:
        return value - value + 1
    if value > HALF_MAX:
        return value - value + HALF_MAX
    _, exponent = math.frexp(value)
    quantum = math.ldexp(1.0, max(exponent - 11, -24))
    half: float = max(np.rint(value / quantum) * quantum, HALF_TINY)
    return half


@numba.njit(cache=True)
def _between(low: float, high: float, top: float, sym: bool) -> tuple[float, float]:
    if sym:
        return _half(2 * max(-low, high) / top), (top + 1) // 2
    scale = _half((high - low) / top)
    zero = min(max(np.rint(-low / scale), 0), top)
    if zero < 1:
        return _half(high / (top - 1)), top - top + 1
    return scale, zero


@numba.njit(cache=True)
def _fit(
    members: Floats, importance: Floats, top: float, sym: bool, signed: bool, reaches: Floats, scale: Floats,
    zero: Floats,
) -> None:  # fmt: skip
    """Fit the grids of LANES rows: ``members`` is [group, LANES]; results go into ``scale`` and ``zero`` [LANES]."""
    low, high = np.zeros_like(scale), np.zeros_like(scale)
    for member in range(len(members)):
        for lane in range(LANES):
            low[lane] = min(low[lane], members[member, lane])
            high[lane] = max(high[lane], members[member, lane])
    trial, origin = np.empty_like(scale), np.empty_like(scale)
    best, error = np.full_like(scale, math.inf), np.empty_like(scale)
    floor = top - top
    for step in range(2 * len(reaches) if signed else len(reaches)):
        reach, turned = reaches[step // 2 if signed else step], signed and step % 2 == 1
        for lane in range(LANES):
            trial[lane], origin[lane] = _between(low[lane] * reach, high[lane] * reach, top, sym)
            if turned:
                trial[lane] = -trial[lane]
            error[lane] = 0
        if len(reaches) > 1:
            for member in range(len(members)):
                for lane in range(LANES):
                    value = members[member, lane]
                    code = np.rint(min(max(value / trial[lane] + origin[lane], floor), top))
                    apart = trial[lane] * (code - origin[lane]) - value
                    error[lane] += importance[member] * (apart * apart)
        for lane in range(LANES):
            if step == 0 or error[lane] < best[lane]:  # step 0 always counts: a NaN error must not keep a stale grid
                best[lane], scale[lane], zero[lane] = error[lane], trial[lane], origin[lane]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def fit_groups(
    weight: Floats,
    importance: Floats,
    tops: Floats,
    reaches: Floats,
    scales: Floats,
    zeros: Floats,
    size: int,
    sym: bool,
    signed: bool,
) -> None:
    """Fit the grids of contiguous groups of ``weight`` [N, K] into ``scales`` and ``zeros`` [G, N]."""
    rows, columns = weight.shape
    for tile in numba.prange((rows + LANES - 1) // LANES):
        row = tile * LANES
        count = min(LANES, rows - row)
        members = np.zeros((size, LANES), weight.dtype)
        scale, zero = np.ones(LANES, weight.dtype), np.zeros(LANES, weight.dtype)
        for group in range(columns // size):
            for lane in range(count):
                for member in range(size):
                    members[member, lane] = weight[row + lane, group * size + member]
            _fit(members, importance[group * size : (group + 1) * size], tops[0], sym, signed, reaches, scale, zero)
            for lane in range(count):
                scales[group, row + lane] = scale[lane]
                zeros[group, row + lane] = zero[lane]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def round_columns(
    work: Floats, upper: Floats, order: Integers, groups: Integers, sizes: Integers,
    scales: Floats, zeros: Floats, tops: Floats, levels: Floats, syms: Flags, searches: Flags, signed: Flags,
    reaches: Floats, importance: Floats,
    codes: NDArray[np.uint8], errors: Floats, squares: NDArray[np.float64],
    first: int, last: int,
) -> None:  # fmt: skip
    variants, rows, _ = work.shape
    length = last - first
    tiles = (rows + LANES - 1) // LANES
    limits = (levels[1:] + levels[:-1]) / levels.dtype.type(2)
    for tile in numba.prange(variants * tiles):
        variant = tile // tiles
        row = (tile % tiles) * LANES
        count = min(LANES, rows - row)
        top, size = tops[variant], sizes[variant]
        floor = top - top  # zero in the weight's dtype: a literal would widen every sum to float64
        # the run's columns of LANES rows, transposed: rows are contiguous within a column, for the vector units
        block = np.zeros((length, LANES), work.dtype)
        for lane in range(count):
            for column in range(length):
                block[column, lane] = work[variant, row + lane, first + column]
        scale, zero = np.ones(LANES, work.dtype), np.zeros(LANES, work.dtype)
        error, code = np.zeros(LANES, work.dtype), np.zeros(LANES, work.dtype)
        square = np.zeros(LANES)
        for column in range(length):
            place = first + column
            group = groups[variant, place]
            if size > 0 and place % size == 0:
                members = block[column : column + size]
                if column + size > length:
                    members = np.zeros((size, LANES), work.dtype)
                    for lane in range(count):
                        for member in range(size):
                            members[member, lane] = work[variant, row + lane, place + member]
                tried = reaches if searches[variant] else reaches[:1]
                _fit(members, importance[place : place + size], top, syms[variant], signed[variant], tried, scale, zero)
                for lane in range(count):
                    scales[variant, group, row + lane] = scale[lane]
                    zeros[variant, group, row + lane] = zero[lane]
            for lane in range(count):
                scale[lane] = scales[variant, group, row + lane]
                zero[lane] = zeros[variant, group, row + lane]
            diagonal = upper[place, place]
            if len(levels):
                for lane in range(LANES):
                    weight = block[column, lane]
                    position, found = weight / scale[lane] + zero[lane], 0
                    for limit in range(len(limits)):
                        found += position > limits[limit]
                    code[lane] = found
                    error[lane] = (weight - scale[lane] * (levels[found] - zero[lane])) / diagonal
            else:
                for lane in range(LANES):
                    weight = block[column, lane]
                    rounded = np.rint(min(max(weight / scale[lane] + zero[lane], floor), top))
                    value = scale[lane] * (rounded - zero[lane])
                    code[lane] = rounded
                    error[lane] = (weight - value) / diagonal
            natural = order[place]
            for lane in range(count):
                codes[variant, row + lane, natural] = np.uint8(code[lane])
                errors[variant, row + lane, column] = error[lane]
                square[lane] += np.float64(error[lane]) * error[lane]
            for later in range(column + 1, length):
                factor = upper[place, first + later]
                for lane in range(LANES):
                    block[later, lane] -= error[lane] * factor
        for lane in range(count):
            squares[variant, row + lane] += square[lane]


@numba.njit(cache=True, error_model="numpy")
def invert_factor(block: Floats) -> bool:
    """Replace a symmetric ``block`` [K, K] by inverse(L), where block = L L^T; False if it is not positive definite."""
    size = len(block)
    upper = np.empty((size, size), block.dtype)  # L^T, whose rows are contiguous for the vector units
    for row in range(size):
        for column in range(row, size):
            upper[row, column] = block[column, row]
    for pivot in range(size):
        if not upper[pivot, pivot] > 0 or upper[pivot, pivot] == math.inf:
            return False
        root = np.sqrt(upper[pivot, pivot])
        for column in range(pivot, size):
            upper[pivot, column] /= root
        for row in range(pivot + 1, size):
            factor = upper[pivot, row]
            for column in range(row, size):
                upper[row, column] -= factor * upper[pivot, column]
    for row in range(size):
        inverse = np.zeros(size, block.dtype)
        inverse[row] = 1
        for earlier in range(row):
            factor = upper[earlier, row]
            for column in range(earlier + 1):
                inverse[column] -= factor * block[earlier, column]
        for column in range(size):
            block[row, column] = inverse[column] / upper[row, row]
    return True
