"""The state of a GPTQ solve, as data: every kernel reads and writes the same tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quantize.methods.grid import Grid

Kernel = Literal["numba", "triton", "torch"]
"""The implementation of the inner loop."""


@dataclass
class Columns:
    """The state of a solve of V variants over N rows and K columns in solve order.

    Attributes:
        work: the weight for each variant, updated with the errors, [V, N, K].
        upper: U, [K, K]. importance: 1 / U[j, j]^2, the weight of a squared error in each column, [K].
        order: position of each column in the natural order, [K] int64.
        groups: group of each column, [V, K] int64.
        sizes: group size of variants whose grids are fitted during the solve, 0 for fixed grids, [V] int64.
        scales, zeros: [V, G, N] in the weight's dtype.
        grids: the grid of each variant.
        codes: [V, N, K] uint8, in natural order.
        squares: sum of squared errors e^2, [V, N] float64.
        kernel: the implementation of the inner loop.
        levels: the values that codes stand for where they are not the codes themselves, ascending, [L]; for fixed grids
            only.
        settings: the variants' parameters on the GPU, copied there once per solve.
    """

    work: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    sizes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    grids: list[Grid]
    codes: torch.Tensor
    squares: torch.Tensor
    kernel: Kernel
    levels: torch.Tensor | None = None
    settings: tuple[torch.Tensor, torch.Tensor] | None = None
