"""The inner loop of GPTQ: a run of columns rounded one by one, each error spread over the run's rest.

Rows are independent of each other, so the compiled CPU kernel walks each row on its own: it fits the grid where
a group begins, rounds, spreads, and sums errors, with no other pass over the data. The torch version takes one
column of all rows at a time; it is the reference, and the path for other devices. Both do the same operations in
the same order and give the same codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantize.methods.grid import HALF_MAX, HALF_TINY, MSE_NORM, MSE_SHRINK, MSE_STEPS, Grid

LANES = 64  # rows that the compiled kernel walks together


@dataclass
class Columns:
    """The state of a solve of V variants over N rows and K columns in solve order.

    Attributes:
        original: the weight, [N, K]. work: its copy for each variant, [V, N, K], taking the errors.
        upper: U, [K, K].
        order: natural place of each column, [K] int64.
        groups: group of each column, [V, K] int64.
        sizes: group size of the variants whose grids are fitted on the way, 0 where they are fixed, [V] int64.
        scales, zeros: [V, G, N] in the weight's dtype.
        grids: the grid of each variant.
        codes: [V, N, K] uint8, in natural order.
        squares: sum of squared errors e^2, [V, N] float64. spread: sum of (w - q)^2, [V, N] float64.
    """

    original: torch.Tensor
    work: torch.Tensor
    upper: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    sizes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    grids: list[Grid]
    codes: torch.Tensor
    squares: torch.Tensor
    spread: torch.Tensor

    def round(self, first: int, last: int, compiled: bool) -> torch.Tensor:
        """Round columns ``first`` to ``last``; ``work`` changes inside that run only.

        Returns:
            The errors (w - q) / U[j, j], [V, N, last - first].
        """
        errors = torch.empty(*self.work.shape[:2], last - first, device=self.work.device, dtype=self.work.dtype)
        if compiled and self.work.device.type == "cpu":
            self._round_compiled(errors, first, last)
        else:
            self._round_torch(errors, first, last)
        return errors

    def _round_compiled(self, errors: torch.Tensor, first: int, last: int) -> None:
        tops = torch.tensor([grid.top for grid in self.grids], dtype=self.work.dtype)
        flags = torch.tensor([[grid.sym, grid.mse] for grid in self.grids])
        tensors = (
            self.original, self.work, self.upper, self.order, self.groups, self.sizes, self.scales, self.zeros,
            tops, flags, self.codes, errors, self.squares, self.spread,
        )  # fmt: skip
        _kernel()(*(tensor.numpy() for tensor in tensors), first, last)

    def _round_torch(self, errors: torch.Tensor, first: int, last: int) -> None:
        tops = torch.tensor([grid.top for grid in self.grids], device=self.work.device, dtype=self.work.dtype)
        sizes = self.sizes.tolist()
        for column in range(first, last):
            for index, size in enumerate(sizes):
                if size and column % size == 0:
                    # beyond the run, earlier columns' errors have not arrived yet: a group never leaves its run
                    fitted = self.grids[index].fit(self.work[index, :, column : column + size])
                    group = self.groups[index, column]
                    self.scales[index, group], self.zeros[index, group] = fitted
            index3 = self.groups[:, column, None, None].expand(-1, 1, self.scales.shape[2])
            scale = torch.gather(self.scales, 1, index3)[:, 0]
            zero = torch.gather(self.zeros, 1, index3)[:, 0]
            weight = self.work[:, :, column]
            code = torch.minimum((torch.round(weight / scale) + zero).clamp_(min=0), tops[:, None])
            value = scale * (code - zero)
            error = (weight - value) / self.upper[column, column]
            self.codes[:, :, self.order[column]] = code.to(torch.uint8)
            errors[:, :, column - first] = error
            self.squares += error.double().square()
            self.spread += (self.original[:, column] - value).double().square()
            self.work[:, :, column + 1 : last] -= error[:, :, None] * self.upper[column, column + 1 : last]


@functools.cache
def _kernel() -> Callable[..., Any]:
    import math

    import numba
    import numpy as np

    trials = int(MSE_SHRINK * MSE_STEPS)
    tiny, huge, steps, norm = HALF_TINY, HALF_MAX, MSE_STEPS, MSE_NORM

    @numba.njit(inline="always")
    def half(value):
        """Rounded to float16, ties to even, in the wider dtype."""
        if not value > 0:
            return value - value + 1
        if value > huge:
            return value - value + huge
        _, exponent = math.frexp(value)
        quantum = math.ldexp(1.0, max(exponent - 11, -24))
        return max(np.rint(value / quantum) * quantum, tiny)

    @numba.njit
    def between(low, high, top, sym):
        if sym:
            return half(2 * max(-low, high) / top), (top + 1) // 2
        scale = half((high - low) / top)
        zero = min(max(np.rint(-low / scale), 0), top)
        if zero < 1:
            return half(high / (top - 1)), top - top + 1
        return scale, zero

    @numba.njit
    def fit(group, top, sym, mse, as_weight):
        low, high = min(group[0], as_weight), max(group[0], as_weight)
        for value in group:
            low, high = min(low, value), max(high, value)
        scale, zero = between(low, high, top, sym)
        if not mse:
            return scale, zero
        best = math.inf
        chosen_scale, chosen_zero = scale, zero
        for step in range(trials):
            shrink = 1 - step / steps
            trial, origin = between(low * shrink, high * shrink, top, sym)
            error = 0.0
            for value in group:
                code = min(max(np.rint(value / trial) + origin, 0), top)
                error += abs(trial * (code - origin) - value) ** norm
                if error >= best:
                    break
            if error < best:
                best, chosen_scale, chosen_zero = error, trial, origin
        return chosen_scale, chosen_zero

    @numba.njit(parallel=True, cache=True, error_model="numpy")
    def kernel(
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
                        fitted = fit(members, top, flags[variant, 0], flags[variant, 1], floor)
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

    return kernel
