"""Codes and scales of ggml's blocks under a Hessian: error feedback onto given scales, then descent on both.

A group of a row has the value ``d * scale * level(code) - dmin * minimum``: ``d`` and ``dmin`` are float16 and belong
to a block, the integers ``scale`` and ``minimum`` to a group of it. With R = W - Q [N, K] and the damped Hessian H, the
error is tr(R H R^T). Along a direction u (what Q changes by in a group or a block) the error changes by
-2 t (R H) u + t^2 u H u, so the best step t is known in closed form. It is rounded to what the file can hold, and taken
where the error still falls: so it never rises, and the result depends on nothing but its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quantize.methods.fixed_grid import FixedGrid, Prepared, improve_onto, round_onto
from quantize.methods.products import no_products
from quantize.methods.sums import energy

PANEL = 256  # columns whose R H is computed together
# products are calls of torch.mm, because ``@`` is decomposed in Python under EvenProducts
ROUNDS = 2
"""Rounds of moving scales and then codes, after the first solve. More win less than 1 %."""
SINGULAR = 1e-6


@dataclass(frozen=True)
class BlockGrid:
    """What a block type can hold.

    Attributes:
        size, group: columns of a block, and of a group of it.
        lowest, highest: smallest and largest code. levels: what codes from 0 stand for, float32 [L] ascending; None for
            the codes themselves.
        lowest_scale, highest_scale: range of integer scales and minima; both 1 where groups have none of their own.
        minima: whether groups have minima of their own. offset: whether blocks have ``dmin``.
    """

    size: int
    group: int
    lowest: int
    highest: int
    levels: torch.Tensor | None = None
    lowest_scale: int = 1
    highest_scale: int = 1
    minima: bool = False
    offset: bool = False

    @property
    def has_scales(self) -> bool:
        """Whether groups have integer scales of their own."""
        return self.lowest_scale != self.highest_scale


@dataclass(frozen=True)
class Scaled:
    """A weight [N, K] as a block type holds it.

    Attributes:
        codes: [N, K] int16. d, dmin: [N, K / size] float32 with values of float16. scales, minima: [N, K / group]
            float32 with whole values. dmin and minima are None in types without an offset.
    """

    codes: torch.Tensor
    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def values(self, grid: BlockGrid) -> torch.Tensor:
        """The weight, [N, K] float32."""
        return self.fixed(grid).values(self.codes)

    def fixed(self, grid: BlockGrid) -> FixedGrid:
        """The grid that these scales give each group of columns."""
        groups = grid.size // grid.group
        step = self.d.repeat_interleave(groups, 1) * self.scales
        if self.dmin is None or self.minima is None:
            offset = torch.zeros_like(step)
        else:
            offset = self.dmin.repeat_interleave(groups, 1) * self.minima
        # the solver takes a power of two of codes; Q8_0 has one less, which is taken back afterwards
        lowest = grid.highest + 1 - (1 << (grid.highest - grid.lowest).bit_length())
        return FixedGrid(step.t().contiguous(), offset.t().contiguous(), grid.group, lowest, grid.highest, grid.levels)

    def rows(self, chosen: torch.Tensor, other: Scaled) -> Scaled:
        """These rows where ``chosen`` [N], else those of ``other``."""

        def pick(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
            return None if one is None or two is None else torch.where(chosen[:, None], one, two)

        parts = [(self.codes, other.codes), (self.d, other.d), (self.scales, other.scales)]
        codes, d, scales = (torch.where(chosen[:, None], one, two) for one, two in parts)
        return Scaled(codes, d, scales, pick(self.dmin, other.dmin), pick(self.minima, other.minima))


@dataclass(frozen=True)
class BlockSolution:
    """A solved weight.

    Attributes:
        scaled: what the file is to hold. before, after: R H R^T of each row under the Hessian as it is, with the scales
            and codes that were given and with those found, [N] float64. energy: W H W^T of each row.
    """

    scaled: Scaled
    before: torch.Tensor
    after: torch.Tensor
    energy: torch.Tensor


def held(codes: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """What codes stand for before their scale, float32."""
    return codes.float() if grid.levels is None else grid.levels[codes.long()]


def solve_blocks(weight: torch.Tensor, prepared: Prepared, first: Scaled, grid: BlockGrid) -> BlockSolution:
    """Choose codes and scales anew, starting from the scales of ``first``; rows that get no better stay as they are.

    Args:
        weight: [N, K] float32. prepared: the Hessian, factored.
    """
    hessian = prepared.hessian
    damped = hessian.clone()
    damped.diagonal().add_(prepared.factor.damping)
    codes = round_onto(weight, prepared, first.fixed(grid)).clamp_(grid.lowest, grid.highest)
    found = replace(first, codes=codes)
    for _ in range(ROUNDS):
        found = move_scales(weight, damped, found, grid)
        codes = improve_onto(weight, prepared, found.fixed(grid), found.codes).clamp_(grid.lowest, grid.highest)
        found = replace(found, codes=codes)
    found = move_scales(weight, damped, found, grid)
    start, end = (weight - one.values(grid) for one in (first, found))
    better = energy(end, damped) < energy(start, damped)
    before, after = energy(start, hessian), energy(end, hessian)
    return BlockSolution(
        found.rows(better.to(weight.device), first), before, torch.where(better, after, before), energy(weight, hessian)
    )


def move_scales(weight: torch.Tensor, damped: torch.Tensor, it: Scaled, grid: BlockGrid) -> Scaled:
    """One sweep over all scales, minima, d and dmin, for the codes as they are.

    Args:
        damped: the damped Hessian, [K, K].
    """
    moved = replace(
        it,
        d=it.d.clone(),
        scales=it.scales.clone(),
        dmin=None if it.dmin is None else it.dmin.clone(),
        minima=None if it.minima is None else it.minima.clone(),
    )
    level, columns = held(it.codes, grid), weight.shape[1]
    rest = weight - it.values(grid)
    for first in range(0, columns, PANEL):
        last = min(first + PANEL, columns)
        panel = _Panel(first, damped[first:last, first:last], torch.mm(rest, damped[:, first:last]), rest)
        for start in range(first, last, grid.size):
            if grid.has_scales:
                for place in range(start, start + grid.size, grid.group):
                    _move_group(panel, place, moved, level, grid)
            _move_block(panel, start, moved, level, grid)
    return moved


@dataclass
class _Panel:
    """Columns from ``first``: H there [P, P], R H there [N, P], and R of all columns [N, K]."""

    first: int
    curvature: torch.Tensor
    pressure: torch.Tensor
    rest: torch.Tensor

    def at(self, place: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """R H and H at some columns."""
        here = slice(place - self.first, place - self.first + width)
        return self.pressure[:, here], self.curvature[here, here]

    def change(self, place: int, change: torch.Tensor) -> None:
        """Add ``change`` [N, width] to Q at the columns from ``place``."""
        width = change.shape[1]
        here = slice(place - self.first, place - self.first + width)
        self.pressure -= torch.mm(change, self.curvature[here])
        self.rest[:, place : place + width] -= change


def _move_group(panel: _Panel, place: int, it: Scaled, level: torch.Tensor, grid: BlockGrid) -> None:
    """Move the integer scale and the integer minimum of a group, each to the best whole number."""
    block, group = place // grid.size, place // grid.group
    pressure, curvature = panel.at(place, grid.group)
    along = level[:, place : place + grid.group] * it.d[:, block, None]
    turned = torch.mm(along, curvature)
    with no_products():
        slope, bend = (pressure * along).sum(1), (turned * along).sum(1)
        step = _whole_step(slope, bend, it.scales[:, group], grid)
        it.scales[:, group] += step
    panel.change(place, step[:, None] * along)
    if not grid.minima:
        return
    assert it.dmin is not None
    assert it.minima is not None
    pressure, _ = panel.at(place, grid.group)
    with no_products():
        unit = -it.dmin[:, block]
        slope, bend = pressure.sum(1) * unit, curvature.sum() * unit * unit
        step = _whole_step(slope, bend, it.minima[:, group], grid)
        it.minima[:, group] += step
    panel.change(place, (step * unit)[:, None].expand(-1, grid.group))


def _whole_step(slope: torch.Tensor, bend: torch.Tensor, now: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """The best whole step from ``now`` within the range; 0 where the error would not fall."""
    possible = bend > 0
    best = torch.where(possible, slope / torch.where(possible, bend, 1.0), 0.0).clamp(-512, 512)
    step = (now + best.round()).clamp(grid.lowest_scale, grid.highest_scale) - now
    return torch.where(2 * step * slope - step * step * bend > 0, step, 0.0)


def _move_block(panel: _Panel, place: int, it: Scaled, level: torch.Tensor, grid: BlockGrid) -> None:
    """Move d and dmin of a block by least squares, in float16."""
    block, groups = place // grid.size, grid.size // grid.group
    here = slice(place // grid.group, place // grid.group + groups)
    pressure, curvature = panel.at(place, grid.size)
    along = level[:, place : place + grid.size] * it.scales[:, here].repeat_interleave(grid.group, 1)
    directions, unknowns = [along], [it.d]
    if grid.offset:
        assert it.dmin is not None
        assert it.minima is not None
        directions.append(-it.minima[:, here].repeat_interleave(grid.group, 1))
        unknowns.append(it.dmin)
    turned = [torch.mm(one, curvature) for one in directions]
    with no_products():
        slopes = [(pressure * one).sum(1) for one in directions]
        bends = [[(two * one).sum(1) for one in directions] for two in turned]
        now = [one[:, block] for one in unknowns]
        change = _halved(_least_squares(slopes, bends), now)
        fall = torch.zeros_like(slopes[0])
        for one, slope, row in zip(change, slopes, bends, strict=True):
            fall += 2 * one * slope
            for two, bend in zip(change, row, strict=True):
                fall -= one * two * bend
        good = fall > 0
        if grid.minima:  # the quantizer never makes them negative, so kernels may count on it
            for step, value in zip(change, now, strict=True):
                good &= value + step >= 0
        taken = [torch.where(good, step, 0.0) for step in change]
        for one, step in zip(unknowns, taken, strict=True):
            one[:, block] += step
        moved = torch.stack([step[:, None] * one for step, one in zip(taken, directions, strict=True)]).sum(0)
    panel.change(place, moved)


def _least_squares(slopes: Sequence[torch.Tensor], bends: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The steps that make the error least: one by division, two by Cramer's rule unless they are nearly the same."""
    alone = [
        torch.where(row[place] > 0, slope / torch.where(row[place] > 0, row[place], 1.0), 0.0)
        for place, (slope, row) in enumerate(zip(slopes, bends, strict=True))
    ]
    if len(slopes) == 1:
        return alone
    determinant = bends[0][0] * bends[1][1] - bends[0][1] * bends[1][0]
    regular = determinant > SINGULAR * bends[0][0] * bends[1][1]
    by = torch.where(regular, determinant, 1.0)
    return [
        torch.where(regular, (slopes[0] * bends[1][1] - slopes[1] * bends[0][1]) / by, alone[0]),
        torch.where(regular, (slopes[1] * bends[0][0] - slopes[0] * bends[1][0]) / by, 0.0),
    ]


def _halved(steps: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Steps to the nearest values of float16; 0 where that is infinite."""
    found = []
    for step, value in zip(steps, now, strict=True):
        half = (value + step).to(torch.float16).to(torch.float32)
        found.append(torch.where(torch.isfinite(half), half - value, 0.0))
    return found
