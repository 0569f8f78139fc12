"""The inner loop of GPTQ: round a run of columns one by one, and spread each error over the rest of the run.

Rows are independent of each other, so the compiled kernels process each row separately: they fit the grid where a
group begins, round, spread and sum errors in a single pass over the data. There is one kernel for the CPU (numba)
and one for the GPU (Triton). The torch version processes one column of all rows at a time; it is the reference, and
the fallback where no kernel is available. All do the same operations in the same order and give the same codes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from quantize.methods.compiled import compiled
from quantize.methods.grid import REACHES, Grid
from quantize.methods.solve_state import Columns, Kernel

OUTER = 128  # columns between updates of all remaining columns of W


def kernel_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Kernel:
    """The implementation for a device and dtype: its compiled kernel if available, else torch.

    Triton needs a C compiler on the system to build its kernel launcher.
    """
    if device.type == "cpu":
        return "numba"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = compiler is not None and importlib.util.find_spec("triton") is not None
    return "triton" if device.type == "cuda" and dtype == torch.float32 and found else "torch"


def fit_groups(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, size: int, kernel: Kernel | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the grids of contiguous groups of ``size`` columns of a weight [N, K].

    Args:
        importance: weight of a squared error in each column, [K].
        kernel: the implementation; None selects the device's default.

    Returns:
        Scales and zeros, [K / size, N], in the weight's dtype.
    """
    rows, columns = weight.shape
    kernel = kernel or kernel_of(weight.device, weight.dtype)
    if kernel == "triton":
        from quantize.methods.triton_columns import fit_groups as on_gpu

        return on_gpu(weight, importance, grid, size)
    if kernel == "numba":
        scales, zeros = (torch.empty(columns // size, rows, dtype=weight.dtype) for _ in range(2))
        reaches = torch.tensor(REACHES if grid.mse else REACHES[:1], dtype=weight.dtype)
        top = torch.tensor([grid.top], dtype=weight.dtype)
        tensors = (weight.contiguous(), importance, top, reaches, scales, zeros)
        with compiled() as kernels:
            kernels.fit_groups(*(tensor.numpy() for tensor in tensors), size, grid.sym, grid.signed)
        return scales, zeros
    fitted = [
        grid.fit(part, costs)
        for part, costs in zip(torch.split(weight, size, 1), torch.split(importance, size), strict=True)
    ]
    return torch.stack([scale for scale, _ in fitted]), torch.stack([zero for _, zero in fitted])


def solve_columns(state: Columns, run: int = OUTER) -> None:
    """Round all columns of a solve, and update the columns after a run with the errors of that run at once."""
    columns = state.work.shape[2]
    flat = state.work.view(-1, columns)
    for first in range(0, columns, run):
        last = min(first + run, columns)
        errors = round_columns(state, first, last)
        if last < columns:
            flat[:, last:].addmm_(errors.view(len(flat), -1), state.upper[first:last, last:], alpha=-1)


def round_columns(state: Columns, first: int, last: int) -> torch.Tensor:
    """Round columns ``first`` to ``last`` of a solve; its ``work`` changes inside that run only.

    Returns:
        The errors (w - q) / U[j, j], [V, N, last - first].
    """
    errors = torch.empty(*state.work.shape[:2], last - first, device=state.work.device, dtype=state.work.dtype)
    if state.kernel == "numba":
        _round_numba(state, errors, first, last)
    elif state.kernel == "triton":
        from quantize.methods.triton_columns import round_columns as on_gpu  # triton may not be installed

        on_gpu(state, errors, first, last)
    else:
        _round_torch(state, errors, first, last)
    return errors


def _round_numba(state: Columns, errors: torch.Tensor, first: int, last: int) -> None:
    tops = torch.tensor([grid.top for grid in state.grids], dtype=state.work.dtype)
    syms, searches, signed = (
        torch.tensor([getattr(grid, name) for grid in state.grids]) for name in ("sym", "mse", "signed")
    )
    reaches = torch.tensor(REACHES, dtype=state.work.dtype)
    levels = state.work.new_empty(0) if state.levels is None else state.levels
    tensors = (
        state.work, state.upper, state.order, state.groups, state.sizes, state.scales, state.zeros,
        tops, levels, syms, searches, signed, reaches, state.importance, state.codes, errors, state.squares,
    )  # fmt: skip
    with compiled() as kernels:
        kernels.round_columns(*(tensor.numpy() for tensor in tensors), first, last)


def between(levels: torch.Tensor) -> torch.Tensor:
    """The limits between the values that are rounded to one level and to the next, [L - 1]."""
    return (levels[1:] + levels[:-1]) / 2


def _round_torch(state: Columns, errors: torch.Tensor, first: int, last: int) -> None:
    tops = torch.tensor([grid.top for grid in state.grids], device=state.work.device, dtype=state.work.dtype)
    sizes = state.sizes.tolist()
    for column in range(first, last):
        for index, size in enumerate(sizes):
            if size and column % size == 0:
                # beyond the run, earlier columns' errors have not arrived yet: a group never leaves its run
                fitted = state.grids[index].fit(
                    state.work[index, :, column : column + size], state.importance[column : column + size]
                )
                group = state.groups[index, column]
                state.scales[index, group], state.zeros[index, group] = fitted
        index3 = state.groups[:, column, None, None].expand(-1, 1, state.scales.shape[2])
        scale = torch.gather(state.scales, 1, index3)[:, 0]
        zero = torch.gather(state.zeros, 1, index3)[:, 0]
        weight = state.work[:, :, column]
        if state.levels is None:
            code = torch.round(torch.minimum((weight / scale + zero).clamp_(min=0), tops[:, None]))
            value = scale * (code - zero)
        else:
            code = torch.bucketize(weight / scale + zero, between(state.levels))
            value = scale * (state.levels[code] - zero)
        error = (weight - value) / state.upper[column, column]
        state.codes[:, :, state.order[column]] = code.to(torch.uint8)
        errors[:, :, column - first] = error
        state.squares += error.double().square()
        state.work[:, :, column + 1 : last] -= error[:, :, None] * state.upper[column, column + 1 : last]
