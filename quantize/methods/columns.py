"""The inner loop of GPTQ: rounding a run of columns one by one, each error spread over the run's rest.

Rows are independent of each other, so the compiled CPU kernel walks each row on its own; the torch version
takes one column of all rows at a time and is the reference and the path for other devices. Both do the same
operations in the same order and give the same codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def round_columns(
    weights: torch.Tensor,
    first: int,
    last: int,
    upper: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    tops: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    compiled: bool = True,
) -> None:
    """Round columns ``first`` to ``last`` of ``weights`` in place of nothing but their own run.

    Args:
        weights: [variants, rows, K], changed in ``first:last``: each column takes the errors before it.
        upper: U, [K, K].
        scales, zeros: [variants, groups, rows], in the weights' dtype.
        groups: group of each column, [variants, K] int64.
        tops: largest code of each variant, [variants].
        codes: [variants, rows, K] uint8, written in ``first:last``.
        errors: [variants, rows, last - first], written: (w - q) / U[j, j].
        compiled: use the compiled kernel where the tensors are on a CPU.
    """
    if compiled and weights.device.type == "cpu":
        arrays = [tensor.numpy() for tensor in (weights, upper, scales, zeros, groups, tops, codes, errors)]
        _kernel()(*arrays, first, last)
        return
    for column in range(first, last):
        index = groups[:, column, None, None].expand(-1, 1, scales.shape[2])
        scale = torch.gather(scales, 1, index)[:, 0]
        zero = torch.gather(zeros, 1, index)[:, 0]
        weight = weights[:, :, column]
        code = torch.minimum((torch.round(weight / scale) + zero).clamp_(min=0), tops[:, None])
        error = (weight - scale * (code - zero)) / upper[column, column]
        codes[:, :, column] = code.to(torch.uint8)
        errors[:, :, column - first] = error
        weights[:, :, column + 1 : last] -= error[:, :, None] * upper[column, column + 1 : last]


@functools.cache
def _kernel() -> Callable[..., Any]:
    import numba
    import numpy as np

    @numba.njit(parallel=True, cache=True, error_model="numpy")
    def kernel(weights, upper, scales, zeros, groups, tops, codes, errors, first, last):
        variants, rows, _ = weights.shape
        for flat in numba.prange(variants * rows):
            variant = flat // rows
            row = flat % rows
            line = weights[variant, row]
            top = tops[variant]
            for column in range(first, last):
                group = groups[variant, column]
                scale = scales[variant, group, row]
                zero = zeros[variant, group, row]
                weight = line[column]
                code = np.rint(weight / scale) + zero
                if code < 0:
                    code = zero - zero  # a literal 0.0 would widen the sums below to float64
                elif code > top:
                    code = top
                error = (weight - scale * (code - zero)) / upper[column, column]
                codes[variant, row, column] = np.uint8(code)
                errors[variant, row, column - first] = error
                for later in range(column + 1, last):
                    line[later] -= error * upper[column, later]

    return kernel
