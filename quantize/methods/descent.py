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

import numpy as np
import torch

from quantize.methods.columns import between
from quantize.methods.compiled import compiled
from quantize.methods.grid import as_half
from quantize.methods.solve_state import Kernel

BLOCK = 64
WIDEST = 128
"""Columns of a block, and of a group that is taken as one."""


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
        rows, columns = self.codes.shape
        held = self.codes.to(self.scales.dtype) if self.levels is None else self.levels[self.codes.long()]
        if self.order is None:
            groups = held.view(rows, -1, self.group_size)
            return ((groups - self.zeros.t()[:, :, None]) * self.scales.t()[:, :, None]).view(rows, columns)
        group = torch.empty_like(self.order)
        group[self.order] = torch.arange(columns, device=self.codes.device) // self.group_size
        return (held - self.zeros.t()[:, group]) * self.scales.t()[:, group]


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
    descent = _Descent(hessian, damping, rounded, rest, weight.new_zeros(len(weight), dtype=torch.float64))
    improve = descent.improve_numba if kernel == "numba" else descent.improve_torch
    columns, size = weight.shape[1], rounded.group_size
    for sweep in range(sweeps):
        refit = rounded.refit and sweep == 0
        if size <= WIDEST:
            width = max(BLOCK // size, 1) * size
            for first in range(0, columns, width):
                improve(first, min(first + width, columns), size, refit)
            continue
        for start in range(0, columns, size):
            if refit:
                descent.refit(start // size)
            for first in range(start, start + size, BLOCK):
                last = min(first + BLOCK, start + size)
                improve(first, last, last - first, False)
    return descent.gains, rest


@dataclass
class _Descent:
    """The state of a descent: R = ``rest`` [N, K], and the fall of each row's error so far, ``gains`` [N]."""

    hessian: torch.Tensor
    damping: torch.Tensor
    rounded: Rounded
    rest: torch.Tensor
    gains: torch.Tensor

    def improve_numba(self, first: int, last: int, size: int, refit: bool) -> None:
        """Improve columns ``first`` to ``last`` in the order of groups, whose groups have ``size`` columns there."""
        rounded = self.rounded
        columns = self._columns(first, last)
        beside = self.hessian[:, first:last] if rounded.order is None else self.hessian[:, columns]
        levels = self.rest.new_empty(0) if rounded.levels is None else rounded.levels
        tensors = (
            self.rest @ beside, self.hessian, self.damping, columns, self.rest, rounded.codes, rounded.scales,
            rounded.zeros, levels,
        )  # fmt: skip
        top = np.dtype(str(self.rest.dtype).removeprefix("torch.")).type(rounded.top)  # as are all scalars in there
        with compiled("descent_kernel") as kernels:
            kernels.descend(
                *(tensor.numpy() for tensor in tensors), top, size, first // rounded.group_size, refit,
                refit and rounded.fit_zeros, self.gains.numpy(),
            )  # fmt: skip

    def improve_torch(self, first: int, last: int, size: int, refit: bool) -> None:
        """The reference of the compiled kernel, and the implementation for GPUs: all rows of a column at a time."""
        rounded = self.rounded
        columns = self._columns(first, last)
        curvature, pressure = self._around(columns)
        held = self._held(columns)
        limits = None if rounded.levels is None else between(rounded.levels)
        changes = torch.zeros_like(pressure)
        for start in range(0, len(columns), size):
            group, members = (first + start) // rounded.group_size, slice(start, start + size)
            if refit:
                moved = self._refit(group, pressure[:, members], curvature[members, members], held[:, members])
                changes[:, members] += moved
                pressure -= moved @ curvature[members]
            scale = rounded.scales[group]
            for place in range(start, start + size):
                diagonal = curvature[place, place]
                position = held[:, place] + pressure[:, place] * diagonal.reciprocal() * scale.reciprocal()
                if rounded.levels is None or limits is None:
                    new = torch.round(position.clamp(0, rounded.top))
                else:
                    new = rounded.levels[torch.bucketize(position, limits)]
                by = scale * (new - held[:, place])
                fall = by * (2 * pressure[:, place] - by * diagonal)
                taken = fall > 0
                held[:, place] = torch.where(taken, new, held[:, place])
                change = torch.where(taken, by, torch.zeros_like(by))
                self.gains += torch.where(taken, fall, torch.zeros_like(fall))
                changes[:, place] += change
                pressure -= change[:, None] * curvature[place]
        codes = held if limits is None else torch.bucketize(held.contiguous(), limits)
        rounded.codes[:, columns] = codes.to(torch.uint8)
        self.rest[:, columns] -= changes

    def refit(self, group: int) -> None:
        """Refit the scale and zero of a group that is wider than a block."""
        size = self.rounded.group_size
        columns = self._columns(group * size, (group + 1) * size)
        curvature, pressure = self._around(columns)
        self.rest[:, columns] -= self._refit(group, pressure, curvature, self._held(columns))

    def _columns(self, first: int, last: int) -> torch.Tensor:
        """Columns in natural order by place in the order of groups."""
        order = self.rounded.order
        return torch.arange(first, last, device=self.rest.device) if order is None else order[first:last]

    def _around(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Damped H at ``columns`` [B], [B, B], and damped R H there, [N, B]."""
        beside, damping = self.hessian[:, columns], self.damping[columns]
        pressure = (self.rest @ beside) + self.rest[:, columns] * damping
        curvature = beside[columns]
        curvature.diagonal().add_(damping)
        return curvature, pressure

    def _held(self, columns: torch.Tensor) -> torch.Tensor:
        """What codes stand for before scale and zero, [N, B]."""
        codes, levels = self.rounded.codes[:, columns], self.rounded.levels
        return codes.to(self.rest.dtype) if levels is None else levels[codes.long()]

    def _refit(self, group: int, pressure: torch.Tensor, curvature: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Refit one group's scale, then its zero, in place; returns what its weights change by, [N, size].

        Args:
            pressure: damped R H at the group's columns, [N, size]. curvature: damped H there. held: what its codes
                stand for.
        """
        rounded = self.rounded
        scale, zero = rounded.scales[group], rounded.zeros[group]
        apart = held - zero[:, None]
        turned = apart @ curvature
        slope = (apart.double() * pressure).sum(dim=1)
        bend = (apart.double() * turned).sum(dim=1)
        better = as_half(scale + (slope / torch.where(bend > 0, bend, torch.ones_like(bend))).to(scale.dtype))
        by = better.double() - scale
        fall = 2 * by * slope - by.square() * bend
        taken = (bend > 0) & (better * scale > 0) & (fall > 0)
        step = torch.where(taken, by, torch.zeros_like(by)).to(scale.dtype)[:, None]
        moved = step * apart
        self.gains += torch.where(taken, fall, torch.zeros_like(fall))
        scale.copy_(torch.where(taken, better, scale))
        if rounded.fit_zeros:
            whole = curvature.double().sum()
            slope = (pressure - step * turned).double().sum(dim=1)
            wanted = torch.round(zero - (slope / whole).to(scale.dtype) / scale)
            better = wanted.clamp(1, rounded.top)
            by = scale.double() * (zero - better)
            fall = 2 * by * slope - by.square() * whole
            taken = (whole > 0) & (fall > 0)
            moved = moved + torch.where(taken, by, torch.zeros_like(by)).to(scale.dtype)[:, None]
            self.gains += torch.where(taken, fall, torch.zeros_like(fall))
            zero.copy_(torch.where(taken, better, zero))
        return moved
