"""Read float8 matrices and their factors; see :mod:`quantize.source.float8`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantize.source.float8 import Float8

ROWS = 1024
"""Rows that are multiplied at a time, which bounds the memory for float32."""


def read_float8(name: str, one: Float8, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A float8 tensor as bfloat16 of the same shape: each number times its block's factor, rounded once.

    Args:
        read: reads a tensor as stored, by name.
    """
    codes = read(name)
    if not one.scales:
        return codes.to(torch.bfloat16)  # which has every float8 number
    matrix = codes.reshape(-1, codes.shape[-1])
    rows, columns = one.block
    factors = _factors(read(one.scales)).reshape(-1, -(-matrix.shape[1] // columns))
    within = codes.shape[-2] if codes.dim() > 1 and rows < len(matrix) else len(matrix)  # blocks do not cross experts
    each = -(-within // rows)
    values = torch.empty(matrix.shape, dtype=torch.bfloat16)
    for first in range(0, len(matrix), ROWS):
        index = torch.arange(first, min(first + ROWS, len(matrix)))
        own = factors[index // within * each + index % within // rows]
        product = matrix[first : first + ROWS].to(torch.float32)
        product *= own.repeat_interleave(columns, dim=1)[:, : matrix.shape[1]]
        values[first : first + ROWS] = product
    return values.reshape(codes.shape)


def _factors(stored: torch.Tensor) -> torch.Tensor:
    """Factors as float32; bytes are exponents of 2 with a bias of 127."""
    if stored.dtype == torch.uint8:
        return torch.ldexp(torch.ones(stored.shape), stored.to(torch.int32) - 127)
    return stored.to(torch.float32)
