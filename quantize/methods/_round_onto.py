"""Stand-in for the solver of fixed grids: plain torch, column by column."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantize.methods.factor import activation_order, factorize


@dataclass(frozen=True)
class FixedGrid:
    scales: torch.Tensor
    zeros: torch.Tensor
    group_size: int
    lowest: int
    highest: int
    levels: torch.Tensor | None = None


def damping_of(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    diagonal = hessian.diagonal()
    return damping * (diagonal + 0.01 * diagonal.mean())


def nearest(position: torch.Tensor, grid: FixedGrid) -> torch.Tensor:
    if grid.levels is not None:
        limits = (grid.levels[1:] + grid.levels[:-1]) / 2
        return torch.bucketize(position.contiguous(), limits).to(torch.int16)
    return position.clamp(grid.lowest, grid.highest).round().to(torch.int16)


def held(codes: torch.Tensor, grid: FixedGrid) -> torch.Tensor:
    return codes.float() if grid.levels is None else grid.levels[codes.long()]


def round_onto(weight, hessian, grid, *, damping, sweeps=2):
    damped = hessian.clone()
    damped.diagonal().add_(damping_of(hessian, damping))
    order = activation_order(hessian)
    factor = factorize(damped, 0.0, order)
    upper = factor.upper
    rest = weight[:, order].clone()
    codes = torch.empty(weight.shape, dtype=torch.int16)
    for first in range(0, len(order), 64):
        last = min(first + 64, len(order))
        errors = torch.zeros(len(weight), last - first)
        for place in range(first, last):
            column = int(order[place])
            scale, zero = grid.scales[column // grid.group_size], grid.zeros[column // grid.group_size]
            code = nearest(rest[:, place] / scale + zero, grid)
            value = scale * (held(code, grid) - zero)
            codes[:, column] = code
            error = (rest[:, place] - value) / upper[place, place]
            errors[:, place - first] = error
            rest[:, place:last] -= error[:, None] * upper[place, place:last][None]
        rest[:, last:] -= errors @ upper[first:last, last:]
    return descend_codes(weight, damped, codes, grid, sweeps)


def descend_codes(weight, damped, codes, grid, sweeps):
    size = grid.group_size
    group = torch.arange(weight.shape[1]) // size
    for _ in range(sweeps):
        values = grid.scales.t()[:, group] * (held(codes, grid) - grid.zeros.t()[:, group])
        rest = weight - values
        for first in range(0, weight.shape[1], 128):
            last = min(first + 128, weight.shape[1])
            pressure = rest @ damped[:, first:last]
            local = damped[first:last, first:last]
            for column in range(first, last):
                scale, zero = grid.scales[column // size], grid.zeros[column // size]
                at = column - first
                new = nearest((values[:, column] + pressure[:, at] / local[at, at]) / scale + zero, grid)
                change = scale * (held(new, grid) - zero) - values[:, column]
                better = 2 * change * pressure[:, at] - change * change * local[at, at] > 0
                change = change * better
                codes[:, column] = torch.where(better, new, codes[:, column])
                values[:, column] += change
                rest[:, column] -= change
                pressure -= change[:, None] * local[at][None]
    return codes
