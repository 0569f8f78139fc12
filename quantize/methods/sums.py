"""Sums whose last bits do not depend on the number of threads."""

from __future__ import annotations

import math

import torch

SAFE_POWER = 32  # rows of up to 2^32, or down to 2^-32, have squares far inside float32
RUN = 4096  # values added by one thread, far below the size at which torch splits a sum among threads


def total(values: torch.Tensor) -> float:
    """The sum of all values, in float64; torch's own sum of many values depends on its number of threads."""
    flat = values.reshape(-1).double()
    while len(flat) > RUN:
        whole = len(flat) // RUN * RUN
        parts = flat[:whole].view(-1, RUN).sum(dim=1)
        flat = torch.cat([parts, flat[whole:].sum()[None]]) if whole < len(flat) else parts
    return float(flat.sum())


def mean(values: torch.Tensor) -> float:
    """The mean of all values, in float64."""
    return total(values) / values.numel()


def energy(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The diagonal of R H R^T for rows R [N, K] and H [K, K], as [N] float64 on the CPU.

    Squares of very small or very large rows would leave float32: such rows are first multiplied by a power of two.
    """
    low, high = torch.aminmax(rows)
    largest = max(-float(low), float(high))
    power = math.frexp(largest)[1] if math.isfinite(largest) else 0
    if abs(power) <= SAFE_POWER:
        power = 0
    half = -power // 2  # in two steps: 2^149 is no float32
    near = rows * 2.0**half * 2.0 ** (-power - half) if power else rows
    return ((near @ hessian) * near).sum(dim=1, dtype=torch.float64).cpu() * 4.0**power
