"""The GPU kernel of :mod:`quantize.methods.columns`, in Triton, on the grid of :mod:`quantize.methods.grid`.

One program processes a run of columns for ROWS rows of one variant, like the compiled CPU kernel; one launch covers
all rows of all variants. Each lane has a row, and eight warps share the run's columns, which then fit in registers.

Every operation is rounded separately, as in the torch version: no fused multiply-add, IEEE division (Triton's ``/`` is
approximate in float32), ties to even. A search sums its errors column by column, like the CPU kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quantize.methods.grid import HALF_MAX, HALF_TINY, REACHES, Grid
from quantize.methods.solve_state import Columns

ROWS = 32
OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}

TINY, MOST = tl.constexpr(HALF_TINY), tl.constexpr(HALF_MAX)
TRIED = tl.constexpr(len(REACHES))
TRIALS = tl.constexpr(triton.next_power_of_2(2 * len(REACHES)))
MAGIC = tl.constexpr(1.5 * 2.0**23)  # float32 values of this size are integers, so adding it rounds, ties to even
INFINITY = tl.constexpr(float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _code(value: tl.tensor, scale: tl.tensor, zero: tl.tensor, top: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(tl.div_rn(value, scale) + zero, 0.0), top) + MAGIC - MAGIC


@triton.jit  # type: ignore[untyped-decorator]
def _half(value: tl.tensor) -> tl.tensor:
    value = tl.where(value > 0, value, 1.0)
    return tl.minimum(tl.maximum(value, TINY), MOST).to(tl.float16).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _between(low: tl.tensor, high: tl.tensor, top: tl.tensor, sym: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    whole = _half(tl.div_rn(2 * tl.maximum(-low, high), top))
    span = _half(tl.div_rn(high - low, top))
    zero = _code(-low, span, 0.0, top)
    narrow = _half(tl.div_rn(high, top - 1))
    scale = tl.where(sym, whole, tl.where(zero < 1, narrow, span))
    return scale, tl.where(sym, (top + 1) * 0.5, tl.maximum(zero, 1.0))


@triton.jit  # type: ignore[untyped-decorator]
def _fit(
    rows: tl.tensor, inside: tl.tensor, importance: tl.tensor, size: tl.tensor,
    top: tl.tensor, sym: tl.tensor, mse: tl.tensor, signed: tl.tensor, reaches: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Fit the grids of groups of ``size`` members starting at the pointers ``rows`` [ROWS]; ``inside`` masks lanes."""
    low = tl.zeros(inside.shape, tl.float32)
    high = tl.zeros(inside.shape, tl.float32)
    for member in range(size):
        value = tl.load(rows + member, inside, 0.0)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
    number = tl.arange(0, TRIALS)
    # with signed scales each range is tried with both signs, one after the other
    step = tl.where(signed, number // 2, number)
    reach = tl.load(reaches + step, step < TRIED, 1.0)[:, None]
    trial, origin = _between(low[None, :] * reach, high[None, :] * reach, top, sym)
    trial = tl.where((signed & (number % 2 == 1))[:, None], -trial, trial)
    error = tl.zeros_like(trial)
    if mse:
        for member in range(size):
            value = tl.load(rows + member, inside, 0.0)[None, :]
            code = _code(value, trial, origin, top)
            apart = trial * (code - origin) - value
            error += tl.load(importance + member) * (apart * apart)
    wanted = (step < TRIED) & (mse | (number == 0))
    # a NaN error must not win
    error = tl.where(wanted[:, None] & (error < INFINITY), error, INFINITY)
    chosen = number[:, None] == tl.argmin(error, axis=0, tie_break_left=True)[None, :]
    return tl.sum(tl.where(chosen, trial, 0.0), axis=0), tl.sum(tl.where(chosen, origin, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _fit_groups(
    weight: tl.tensor, importance: tl.tensor, reaches: tl.tensor, scales: tl.tensor, zeros: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, size: tl.tensor, top: tl.tensor, sym: tl.tensor, mse: tl.tensor,
    signed: tl.tensor, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inside = row < rows
    scale, zero = _fit(
        weight + row * columns + group * size, inside, importance + group * size, size, top, sym != 0, mse != 0,
        signed != 0, reaches,
    )  # fmt: skip
    tl.store(scales + group * rows + row, scale, inside)
    tl.store(zeros + group * rows + row, zero, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _round_columns(
    work: tl.tensor, upper: tl.tensor, order: tl.tensor, groups: tl.tensor,
    settings: tl.tensor, scales: tl.tensor, zeros: tl.tensor, reaches: tl.tensor, importance: tl.tensor,
    codes: tl.tensor, errors: tl.tensor, squares: tl.tensor,
    rows: tl.tensor, columns: tl.tensor, most: tl.tensor, first: tl.tensor, length: tl.tensor,
    ROWS: tl.constexpr, LENGTH: tl.constexpr,
) -> None:  # fmt: skip
    variant = tl.program_id(1)
    settings += 5 * variant
    size, levels = tl.load(settings), tl.load(settings + 1)
    sym, mse, signed = tl.load(settings + 2) != 0, tl.load(settings + 3) != 0, tl.load(settings + 4) != 0
    top = levels.to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    # move all pointers to this variant's data
    skipped = variant.to(tl.int64) * rows
    work += skipped * columns + first
    codes += skipped * columns
    errors += skipped * length
    scales += skipped * most
    zeros += skipped * most
    groups += variant * columns + first
    squares += skipped
    order += first
    importance += first
    upper += first.to(tl.int64) * (columns + 1)
    square = tl.load(squares + row, inside, 0.0)
    place = tl.arange(0, LENGTH)
    whole = (place < length)[:, None] & inside[None, :]
    # holds the run's remaining columns, and the errors of the columns already rounded
    block = tl.load(work + (row * columns)[None, :] + place[:, None], whole, 0.0)
    for column in range(length):
        grid = tl.load(groups + column).to(tl.int32) * rows + row
        if (size > 0) & ((first + column) % tl.maximum(size, 1) == 0):
            # a group may extend beyond the run, so it is fitted in global memory
            tl.store(work + (row * columns)[None, :] + place[:, None], block, whole)
            tl.debug_barrier()  # other threads read what this one wrote
            fitted, origin = _fit(
                work + column + row * columns, inside, importance + column, size, top, sym, mse, signed, reaches
            )
            tl.store(scales + grid, fitted, inside)
            tl.store(zeros + grid, origin, inside)
            tl.debug_barrier()
            block = tl.load(work + (row * columns)[None, :] + place[:, None], whole, 0.0)
        scale, zero = tl.load(scales + grid, inside, 1.0), tl.load(zeros + grid, inside, 0.0)
        current = (place == column)[:, None]
        weight = tl.sum(tl.where(current, block, 0.0), axis=0)
        code = _code(weight, scale, zero, top)
        value = scale * (code - zero)
        error = tl.div_rn(weight - value, tl.load(upper + column))
        tl.store(codes + row * columns + tl.load(order + column), code.to(tl.uint8), inside)
        wide = error.to(tl.float64)
        square += wide * wide
        factor = tl.load(upper + place, (place > column) & (place < length), 0.0)
        block = tl.where(current, error[None, :], block - error[None, :] * factor[:, None])
        upper += columns
    tl.store(errors + (row * length)[None, :] + place[:, None], block, whole)
    tl.store(squares + row, square, inside)


def fit_groups(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize.methods.columns.fit_groups` for float32."""
    rows, columns = weight.shape
    groups = columns // size
    scales, zeros = (torch.empty(groups, rows, device=weight.device, dtype=weight.dtype) for _ in range(2))
    reaches = torch.tensor(REACHES, device=weight.device, dtype=weight.dtype)
    _fit_groups[(triton.cdiv(rows, ROWS), groups)](
        weight.contiguous(), importance.contiguous(), reaches, scales, zeros,
        rows, columns, size, float(grid.top), int(grid.sym), int(grid.mse), int(grid.signed), ROWS=ROWS, **OPTIONS,
    )  # fmt: skip
    return scales, zeros


def settings_of(sizes: list[int], grids: list[Grid], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The variants' size, top, sym, mse and signed, [V, 5] int32, and the range factors of a search, float32."""
    rows = [
        [size, grid.top, int(grid.sym), int(grid.mse), int(grid.signed)]
        for size, grid in zip(sizes, grids, strict=True)
    ]
    return torch.tensor(rows, device=device, dtype=torch.int32), torch.tensor(REACHES, device=device)


def round_columns(state: Columns, errors: torch.Tensor, first: int, last: int) -> None:
    """Round columns ``first`` to ``last`` of a float32 solve in one launch; fill ``errors`` [V, N, last - first]."""
    variants, rows, columns = state.work.shape
    if state.settings is None:
        state.settings = settings_of(state.sizes.tolist(), state.grids, state.work.device)
    settings, reaches = state.settings
    length = last - first
    sizes = {"ROWS": ROWS, "LENGTH": triton.next_power_of_2(length)}
    _round_columns[(triton.cdiv(rows, ROWS), variants)](
        state.work, state.upper, state.order, state.groups, settings, state.scales, state.zeros,
        reaches, state.importance, state.codes, errors, state.squares,
        rows, columns, state.scales.shape[1], first, length, **sizes, **OPTIONS,
    )  # fmt: skip
