"""Polish: after GPTQ, scales and zeros in closed form for the codes found, and codes by coordinate descent.

With R = W - Q [N, K] and H the damped Hessian, the error is tr(R H R^T). Changing the quantized weights of a row by d
along u changes it by -2 d (R H) u + d^2 u H u, so the best step along u is (R H) u / u H u: u is the group's
``code - zero`` for its scale, minus one for its zero, and one column for a code. A step is taken only where it makes
the error smaller after rounding to what the file holds, so the error never rises.

Blocks of columns follow each other: R H is computed for one block from the R of that moment, so that a sweep costs
2 N K^2 operations in matrix products, and the steps inside the block need the block's part of H alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantize.methods.columns import between
from quantize.methods.compiled import compiled
from quantize.methods.grid import as_half
from quantize.methods.solve_state import Kernel

BLOCK = 128


@dataclass
class Rounded:
    """A weight [N, K] as codes on a grid; :func:`descend` improves it in place.

    Attributes:
        codes: [N, K] uint8, in natural order. scales, zeros: [G, N] in the weight's dtype; zeros may be fractions where
            they stay as they are.
        group_size: columns of a group. top: the largest code.
        order: the columns so that those of a group are neighbours, [K]; None for the natural order.
        levels: the values that codes stand for if not the codes themselves, ascending, [L].
        refit: whether scales may change. fit_zeros: whether zeros may.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int
    top: int
    order: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    refit: bool = True
    fit_zeros: bool = False

    def values(self) -> torch.Tensor:
        """The weight that the codes stand for, [N, K]."""
        columns = self.codes.shape[1]
        group = torch.empty(columns, dtype=torch.int64, device=self.codes.device)
        places = torch.arange(columns, device=self.codes.device)
        group[places if self.order is None else self.order] = places // self.group_size
        held = self.scales.new_tensor(0) + self.codes if self.levels is None else self.levels[self.codes.long()]
        return self.scales.t()[:, group] * (held - self.zeros.t()[:, group])


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    damping: torch.Tensor,
    rounded: Rounded,
    *,
    sweeps: int = 2,
    kernel: Kernel = "numba",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve ``rounded``, whose weight is ``weight`` [N, K], under ``hessian`` [K, K] + diag(``damping`` [K]).

    Scales and zeros are refitted in the first sweep, codes in each.

    Returns:
        By how much each row's error fell, [N] float64, and R at the end, [N, K].
    """
    rest = weight - rounded.values()
    descent = _Descent(hessian, damping, rounded, rest, weight.new_zeros(len(weight), dtype=torch.float64), kernel)
    columns, size = weight.shape[1], rounded.group_size
    for sweep in range(sweeps):
        refit = rounded.refit and sweep == 0
        if size <= BLOCK:
            width = BLOCK // size * size
            for first in range(0, columns, width):
                descent.block(first, min(first + width, columns), size, refit)
            continue
        for start in range(0, columns, size):
            if refit:
                descent.refit(start // size)
            for first in range(start, start + size, BLOCK):
                last = min(first + BLOCK, start + size)
                descent.block(first, last, last - first, False)
    return descent.gains, rest


@dataclass
class _Descent:
    """The state of a descent: R = ``rest`` [N, K], and the fall of each row's error so far, ``gains`` [N]."""

    hessian: torch.Tensor
    damping: torch.Tensor
    rounded: Rounded
    rest: torch.Tensor
    gains: torch.Tensor
    kernel: Kernel

    def block(self, first: int, last: int, size: int, refit: bool) -> None:
        """Improve columns ``first`` to ``last`` in the order of groups, whose groups have ``size`` columns there."""
        rounded = self.rounded
        columns, curvature, pressure = self._around(first, last)
        groups = slice(first // rounded.group_size, -(-last // rounded.group_size))
        part = Rounded(
            rounded.codes[:, columns].contiguous(),
            rounded.scales[groups].contiguous(),
            rounded.zeros[groups].contiguous(),
            size, rounded.top, levels=rounded.levels, refit=refit, fit_zeros=refit and rounded.fit_zeros,
        )  # fmt: skip
        improve = _improve_numba if self.kernel == "numba" else _improve_torch
        self.rest[:, columns] -= improve(pressure, curvature, part, self.gains)
        rounded.codes[:, columns] = part.codes
        rounded.scales[groups], rounded.zeros[groups] = part.scales, part.zeros

    def refit(self, group: int) -> None:
        """Refit the scale and zero of a group that is wider than a block."""
        rounded, size = self.rounded, self.rounded.group_size
        columns, curvature, pressure = self._around(group * size, (group + 1) * size)
        part = Rounded(
            rounded.codes[:, columns], rounded.scales[group : group + 1], rounded.zeros[group : group + 1], size,
            rounded.top, levels=rounded.levels, fit_zeros=rounded.fit_zeros,
        )  # fmt: skip
        held = _held(part, pressure.dtype)
        self.rest[:, columns] -= _refit(pressure, curvature, held, part, 0, gains=self.gains)

    def _around(self, first: int, last: int) -> tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor]:
        """The columns in natural order, damped H there, and damped R H there."""
        order = self.rounded.order
        columns = slice(first, last) if order is None else order[first:last]
        beside, damping = self.hessian[:, columns], self.damping[columns]
        pressure = (self.rest @ beside).addcmul_(self.rest[:, columns], damping)
        curvature = beside[columns].clone(memory_format=torch.contiguous_format)
        curvature.diagonal().add_(damping)
        return columns, curvature, pressure


def _improve_numba(pressure: torch.Tensor, curvature: torch.Tensor, part: Rounded, gains: torch.Tensor) -> torch.Tensor:
    changes = torch.empty_like(pressure)
    levels = pressure.new_empty(0) if part.levels is None else part.levels
    tensors = (pressure, curvature, part.codes, part.scales, part.zeros, levels)
    top = pressure.new_tensor(part.top).numpy()[()]  # of the weight's dtype, as are all scalars in the kernel
    with compiled("descent_kernel") as kernels:
        kernels.descend(
            *(tensor.numpy() for tensor in tensors), top, part.group_size, part.refit, part.fit_zeros,
            changes.numpy(), gains.numpy(),
        )  # fmt: skip
    return changes


def _improve_torch(pressure: torch.Tensor, curvature: torch.Tensor, part: Rounded, gains: torch.Tensor) -> torch.Tensor:
    """The reference of the compiled kernel, and the implementation for GPUs: all rows of a column at a time."""
    changes = torch.zeros_like(pressure)
    held = _held(part, pressure.dtype)
    limits = None if part.levels is None else between(part.levels)
    for first in range(0, pressure.shape[1], part.group_size):
        group, columns = first // part.group_size, slice(first, first + part.group_size)
        if part.refit:
            inside = pressure[:, columns].contiguous()
            moved = _refit(inside, curvature[columns, columns], held[:, columns], part, group, gains=gains)
            changes[:, columns] += moved
            pressure -= moved @ curvature[columns]
        scale, zero = part.scales[group], part.zeros[group]
        for column in range(first, first + part.group_size):
            diagonal = curvature[column, column]
            value = scale * (held[:, column] - zero)
            position = (value + pressure[:, column] / diagonal) / scale + zero
            if part.levels is None or limits is None:
                new = torch.round(position.clamp(0, part.top))
            else:
                new = part.levels[torch.bucketize(position, limits)]
            by = scale * (new - zero) - value
            fall = 2 * by.double() * pressure[:, column] - by.double().square() * diagonal
            better = fall > 0
            held[:, column] = torch.where(better, new, held[:, column])
            change = torch.where(better, by, torch.zeros_like(by))
            gains += torch.where(better, fall, torch.zeros_like(fall))
            changes[:, column] += change
            pressure -= change[:, None] * curvature[column]
    codes = held if limits is None else torch.bucketize(held.contiguous(), limits)
    part.codes.copy_(codes.to(torch.uint8))
    return changes


def _refit(
    pressure: torch.Tensor,
    curvature: torch.Tensor,
    held: torch.Tensor,
    part: Rounded,
    group: int,
    *,
    gains: torch.Tensor,
) -> torch.Tensor:
    """Refit one group's scale, then its zero, in place; returns what its weights change by, [N, size].

    Args:
        pressure: damped R H at the group's columns, [N, size]. curvature: damped H there. held: what its codes stand
            for. gains: the rows' gains, which are added to.
    """
    scale, zero = part.scales[group], part.zeros[group]
    apart = held - zero[:, None]
    slope = (apart.double() * pressure).sum(dim=1)
    bend = (apart.double() * (apart @ curvature)).sum(dim=1)
    better = as_half(scale + (slope / torch.where(bend > 0, bend, torch.ones_like(bend))).to(scale.dtype))
    by = better.double() - scale
    fall = 2 * by * slope - by.square() * bend
    taken = (bend > 0) & (better * scale > 0) & (fall > 0)
    moved = torch.where(taken, by, torch.zeros_like(by)).to(scale.dtype)[:, None] * apart
    gains += torch.where(taken, fall, torch.zeros_like(fall))
    scale.copy_(torch.where(taken, better, scale))
    if part.fit_zeros:
        whole = curvature.double().sum()
        slope = (pressure - moved @ curvature).double().sum(dim=1)
        wanted = torch.round(zero - (slope / whole).to(scale.dtype) / scale)
        better = wanted.clamp(1, part.top)
        by = scale.double() * (zero - better)
        fall = 2 * by * slope - by.square() * whole
        taken = (whole > 0) & (fall > 0)
        moved = moved + torch.where(taken, by, torch.zeros_like(by)).to(scale.dtype)[:, None]
        gains += torch.where(taken, fall, torch.zeros_like(fall))
        zero.copy_(torch.where(taken, better, zero))
    return moved


def _held(part: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """What codes stand for before scale and zero, [N, B]."""
    return part.codes.to(dtype) if part.levels is None else part.levels[part.codes.long()]
