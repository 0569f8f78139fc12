"""The grid that a group of weights is rounded to: w ~ scale * (code - zero), code in 0 .. 2^bits - 1.

Scales are rounded to float16 at once, the dtype in the file: codes are then chosen for exactly the scale
that the loader multiplies by.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

HALF_TINY = 2.0**-24  # smallest positive float16
HALF_MAX = 65504.0
# factors that the search applies to the range: the full range first, then from a little wider (the outermost weight
# falls between two codes of a symmetric grid) down to the narrow ranges that suit two bits
REACHES = (1.0, *(1.08 - 0.03 * step for step in range(24)))


@dataclass(frozen=True)
class Grid:
    """Width in bits, and whether the zero point is fixed in the middle (``sym``) or fitted; ``mse`` searches for
    the range with the smallest error instead of using the full range; ``signed`` has it try negative scales too.

    An asymmetric zero point is at least 1: the v1 file stores zero minus one, and a wrapped zero is read
    differently by different loaders.
    """

    bits: int
    sym: bool = True
    mse: bool = True
    signed: bool = False

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, weights: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for each row of ``weights`` [rows, group], both [rows] in the weights' dtype.

        Args:
            importance: weight of a squared error in each column, [group]; used only if ``mse`` is set.
        """
        low, high = torch.aminmax(weights, dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale, zero = self._between(low, high)
        if not self.mse:
            return scale, zero
        best = torch.full_like(scale, torch.inf)
        for reach, sign in itertools.product(REACHES, (1, -1) if self.signed else (1,)):
            trial, origin = self._between(low * reach, high * reach)
            trial = trial * sign
            rounded = self.round(weights, trial[:, None], origin[:, None])
            apart = trial[:, None] * (rounded - origin[:, None]) - weights
            error = apart.square_() @ importance
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial, scale)
            zero = torch.where(better, origin, zero)
        return scale, zero

    def round(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes, as integers in the weights' dtype; ``scale`` and ``zero`` broadcast."""
        return torch.round((weights / scale + zero).clamp_(0, self.top))

    def _between(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # divide by tensors: for a plain number a GPU multiplies by its reciprocal, which rounds differently
        top, below = low.new_full((), self.top), low.new_full((), self.top - 1)
        if self.sym:
            reach = torch.maximum(-low, high)
            scale = _as_half(2 * reach / top)
            return scale, torch.full_like(scale, (self.top + 1) // 2)
        scale = _as_half((high - low) / top)
        zero = torch.round(-low / scale).clamp(0, self.top)
        # nothing below zero: give up one code rather than write zero point 0
        positive = zero < 1
        scale = torch.where(positive, _as_half(high / below), scale)
        return scale, torch.where(positive, torch.ones_like(zero), zero)


def _as_half(scale: torch.Tensor) -> torch.Tensor:
    """Round to float16 and back; an all-zero group gets a nonzero scale."""
    return as_half(torch.where(scale > 0, scale, torch.ones_like(scale)))


def as_half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16 of the same sign, in the dtype of ``scale``; neither zero nor infinite."""
    size = scale.abs().clamp(HALF_TINY, HALF_MAX)
    if size.dtype == torch.float64:  # torch converts it by way of float32, and so rounds twice
        quantum = torch.ldexp(torch.ones_like(size), (torch.frexp(size).exponent - 11).clamp(min=-24))
        size = torch.round(size / quantum) * quantum
    return torch.copysign(size.to(torch.float16).to(scale.dtype), scale)
