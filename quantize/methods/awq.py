"""AWQ: scale salient input channels up before rounding, and the preceding operation's outputs down.

Source: Lin, Tang, Tang, Yang, Dang, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", 2023, https://arxiv.org/abs/2306.00978. With s > 0 per input channel, W diag(s) is rounded and the
input becomes X diag(1/s): the float output is unchanged, and each channel's rounding error is divided by its s.

A candidate's error tr((W - W') H (W - W')^T) needs only H = X^T X, so candidates need no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quantize.errors import SolveError
from quantize.methods.factor import Damping
from quantize.methods.gptq import GptqParameters, Solution, round_to_nearest, solve
from quantize.methods.grid import Grid
from quantize.methods.sums import mean, total

STEPS = 20
RATIOS = tuple(step / STEPS for step in range(STEPS + 1))
LARGEST = 256.0  # scales lie in 1 / LARGEST .. LARGEST, so that a float16 norm weight can absorb them
SMALLEST_STEP = 2.0**-20  # float16 holds it with five bits
ROWS = 128  # weight rows sampled by the search; four times as many chose no better scales


@dataclass(frozen=True)
class AwqParameters:
    """Parameters of one AWQ variant. ``group_size`` -1 means one group per row."""

    group_size: int
    bits: int = 4
    zero_point: bool = True
    rounding: Literal["gptq", "nearest"] = "gptq"
    damp_percent: float = 0.1
    mse: bool = True
    damping: Damping = "auto"
    signed_scales: bool = True
    polish: bool = True

    @property
    def rounded(self) -> GptqParameters:
        """How the scaled weight is rounded, as GPTQ parameters: group-aware order, trivial ``g_idx``."""
        return GptqParameters(
            self.bits, self.group_size, sym=not self.zero_point, damp_percent=self.damp_percent, mse=self.mse,
            damping=self.damping, signed_scales=self.signed_scales, polish=self.polish,
        )  # fmt: skip


@dataclass(frozen=True)
class Scales:
    """Result of a scale search.

    Attributes:
        scale: s, the factor of each input channel of the weight, [K] float32.
        ratio: the chosen exponent; 0 leaves the channels unscaled.
    """

    scale: torch.Tensor
    ratio: float


def search_scales(
    weight: torch.Tensor, hessian: torch.Tensor, parameters: AwqParameters, ties: torch.Tensor | None = None
) -> Scales:
    """Find the scales with the smallest error among powers of each channel's root mean square.

    Args:
        weight: [N, K] float32, all linears that read this input, stacked. hessian: [K, K].
        ties: [K] integers; channels with equal numbers (fed by one output of the preceding operation) share one
            scale. None: every channel has its own.

    Raises:
        SolveError: the statistics are not finite.
    """
    power = hessian.diagonal().double()
    if not bool(torch.isfinite(power).all()):
        raise SolveError("its input statistics are not finite")
    if ties is not None:
        sums = torch.zeros(int(ties.max()) + 1, dtype=power.dtype, device=power.device).index_add_(0, ties, power)
        power = (sums / torch.bincount(ties, minlength=len(sums)).clamp(min=1))[ties]
    alive = power > 0
    if not bool(alive.any()):
        return Scales(torch.ones_like(hessian.diagonal()), 0.0)
    strength = power.clamp(min=float(power[alive].min())).sqrt().log()
    strength -= mean(strength[alive])
    sample = weight[torch.linspace(0, len(weight) - 1, min(len(weight), ROWS), device=weight.device).long()]
    best, found = float("inf"), Scales(torch.ones_like(hessian.diagonal()), 0.0)
    for ratio in RATIOS:
        scale = (ratio * strength).exp().clamp(1 / LARGEST, LARGEST).to(weight.dtype)
        scale = torch.where(alive, scale, torch.ones_like(scale))
        error = scaled_error(sample, hessian, scale, parameters)
        if error < best:
            best, found = error, Scales(scale, ratio)
    return found


def scaled_error(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, parameters: AwqParameters) -> float:
    """tr((W - W') H (W - W')^T), where W' is W diag(s) rounded to nearest over its full range, divided by s."""
    rows, columns = weight.shape
    size = columns if parameters.group_size == -1 else parameters.group_size
    scaled = (weight * scale).view(-1, size)
    grid = Grid(parameters.bits, not parameters.zero_point, mse=False)
    step, zero = grid.fit(scaled, scaled[0])
    rounded = step[:, None] * (grid.round(scaled, step[:, None], zero[:, None]) - zero[:, None])
    difference = (rounded - scaled).view(rows, columns) / scale
    return total((difference @ hessian) * difference)


def quantize_scaled(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    parameters: AwqParameters,
    rtn_fallback: bool = False,
) -> Solution:
    """Round W diag(s), whose input has the Hessian diag(1/s) H diag(1/s).

    Args:
        scale: [K], the factor that the preceding operation really divides by (see :func:`divided`).

    Raises:
        SolveError: see :func:`quantize.methods.gptq.solve`.
    """
    scaled, seen = weight * scale, hessian / scale / scale[:, None]
    if parameters.rounding == "nearest":
        solution = round_to_nearest(scaled, seen, parameters.rounded)
        solution.fallback = None
        return solution
    return solve(scaled, seen, [parameters.rounded], rtn_fallback=rtn_fallback)[0]


def no_smaller_than_half(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What rows of ``weight`` [N, K] can be divided by, at most ``scale`` [N], so that their steps still fit float16.

    The steps of a divided row's grid keep five bits. Rows that are too small for that already are not divided.
    """
    steps = weight.abs().amax(dim=1) / (2**bits - 1)
    return torch.minimum(scale, (steps / SMALLEST_STEP).clamp(min=1.0))


def divided(values: torch.Tensor, scale: torch.Tensor, plus_one: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight by s, in the dtype in which it is stored.

    Args:
        values: the stored weight [K]. scale: s [K]. plus_one: the norm multiplies by 1 + weight (Gemma).

    Returns:
        The weight to store, and the factor by which it really differs after rounding to that dtype, [K] in the dtype
        of ``scale``. Scaling the next weight by this factor preserves the float output. A channel whose weight is
        zero, or whose quotient does not fit the dtype, gets factor 1.
    """
    offset = 1.0 if plus_one else 0.0
    factor = values.to(scale.dtype) + offset
    stored = (factor / scale - offset).to(values.dtype)
    real = factor / (stored.to(scale.dtype) + offset)
    keep = ~torch.isfinite(real) | ~torch.isfinite(stored.to(scale.dtype)) | (real <= 0)
    return torch.where(keep, values, stored), torch.where(keep, torch.ones_like(real), real)
