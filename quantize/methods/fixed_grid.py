"""GPTQ onto a grid that is given: error feedback in act-order and coordinate descent on codes, scales as they are.

This is how the grids of other formats are filled whose scales are found elsewhere, such as GGUF's blocks with their
integer scales under a half-precision one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantize.methods.columns import kernel_of, solve_columns
from quantize.methods.descent import Rounded, descend
from quantize.methods.factor import Factor, activation_order, factorize
from quantize.methods.grid import Grid
from quantize.methods.solve_state import Columns

FLAT = 2.0**-40
"""A scale of zero, as a share of the offset, or by itself where that is zero too."""


@dataclass(frozen=True)
class FixedGrid:
    """value = scale * level(code) - offset, for groups of neighbouring columns.

    Attributes:
        scales, offsets: [G, N] float32; scales may be negative or zero.
        group_size: columns of a group.
        lowest, highest: the codes' range, as many as a power of two.
        levels: what each code from ``lowest`` on stands for, ascending, [highest - lowest + 1]; None: the code itself.
    """

    scales: torch.Tensor
    offsets: torch.Tensor
    group_size: int
    lowest: int
    highest: int
    levels: torch.Tensor | None = None

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weight of ``codes`` [N, K] in ``lowest`` .. ``highest``, [N, K] float32."""
        held = codes.float() if self.levels is None else self.levels[codes.long() - self.lowest]
        scales, offsets = (each.t().repeat_interleave(self.group_size, 1) for each in (self.scales, self.offsets))
        return scales * held - offsets


@dataclass(frozen=True)
class Prepared:
    """H damped, ordered and factored, to round any number of weights onto any number of grids.

    Attributes:
        hessian: [K, K], undamped.
    """

    hessian: torch.Tensor
    factor: Factor


def prepare(hessian: torch.Tensor, damp_percent: float = 0.1) -> Prepared:
    """Factor ``hessian`` [K, K] float32 in act-order.

    Raises:
        SolveError: it is not positive definite at any damping tried.
    """
    return Prepared(hessian, factorize(hessian, damp_percent, activation_order(hessian)))


def round_onto(weight: torch.Tensor, prepared: Prepared, grid: FixedGrid, *, sweeps: int = 2) -> torch.Tensor:
    """Codes in ``lowest`` .. ``highest``, [N, K] int16, of ``weight`` [N, K] float32.

    Args:
        sweeps: sweeps of coordinate descent after the solve.
    """
    rows, columns = weight.shape
    factor, device = prepared.factor, weight.device
    assert factor.order is not None
    kernel = kernel_of(device, weight.dtype)
    if grid.levels is not None and kernel == "triton":
        kernel = "torch"
    scales, zeros, levels = _affine(grid)
    state = Columns(
        work=weight[:, factor.order].contiguous()[None],
        upper=factor.upper,
        importance=factor.upper.diagonal().square().reciprocal(),
        order=factor.order,
        groups=(factor.order // grid.group_size)[None],
        sizes=torch.zeros(1, dtype=torch.int64),
        scales=scales[None],
        zeros=zeros[None],
        grids=[Grid((grid.highest - grid.lowest).bit_length(), mse=False)],
        codes=torch.empty(1, rows, columns, device=device, dtype=torch.uint8),
        squares=torch.zeros(1, rows, device=device, dtype=torch.float64),
        kernel=kernel,
        levels=levels,
    )
    solve_columns(state)
    codes = state.codes[0].to(torch.int16) + grid.lowest
    return improve_onto(weight, prepared, grid, codes, sweeps=sweeps) if sweeps else codes


def improve_onto(
    weight: torch.Tensor, prepared: Prepared, grid: FixedGrid, codes: torch.Tensor, *, sweeps: int = 1
) -> torch.Tensor:
    """``codes`` [N, K] in ``lowest`` .. ``highest`` after sweeps of coordinate descent, int16."""
    scales, zeros, levels = _affine(grid)
    rounded = Rounded(
        (codes - grid.lowest).to(torch.uint8), scales, zeros, grid.group_size, grid.highest - grid.lowest,
        levels=levels, refit=False,
    )  # fmt: skip
    kernel = kernel_of(weight.device, weight.dtype)
    descend(weight, prepared.hessian, prepared.factor.damping, rounded, sweeps=sweeps, kernel=kernel)
    return rounded.codes.to(torch.int16) + grid.lowest


def _affine(grid: FixedGrid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scales and zeros of scale * (code - zero), for codes from 0 on; a group of one value gets a tiny scale."""
    flat = (grid.offsets.abs() * FLAT).clamp(min=FLAT)
    scales = torch.where(grid.scales == 0, flat, grid.scales)
    zeros = grid.offsets / scales
    return scales, zeros if grid.levels is not None else zeros - grid.lowest, grid.levels
