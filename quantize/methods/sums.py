"""Sums whose last bits do not depend on the number of threads."""

from __future__ import annotations

import torch

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
