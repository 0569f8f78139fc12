"""The AWQ checkpoint format (AutoAWQ's GEMM layout): tensors of a linear, and the configs that loaders read.

Source: AutoAWQ 0.2.9, as its loaders and those of transformers, vLLM, TGI and GPTQModel read it. Eight codes of
neighbouring outputs fill a 32-bit word; word position p holds output ``INTERLEAVE[p]`` of its eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

BITS = 4
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes [rows, columns] along the columns: int32 [rows, columns / 8].

    Raises:
        ValueError: columns do not divide by 8.
    """
    rows, columns = codes.shape
    if columns % len(INTERLEAVE):
        raise ValueError(f"{columns} outputs of {BITS} bits do not fill 32-bit words")
    eights = codes.to(torch.int32).view(rows, -1, len(INTERLEAVE))
    words = torch.zeros(eights.shape[:2], dtype=torch.int32, device=codes.device)
    for position, output in enumerate(INTERLEAVE):
        words |= eights[:, :, output] << (BITS * position)
    return words


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack`: int32 [rows, columns / 8] -> uint8 [rows, columns]."""
    eights = torch.empty(*words.shape, len(INTERLEAVE), dtype=torch.uint8, device=words.device)
    for position, output in enumerate(INTERLEAVE):
        eights[:, :, output] = ((words >> (BITS * position)) & (2**BITS - 1)).to(torch.uint8)
    return eights.view(words.shape[0], -1)


def encode(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Tensors:
    """The tensors of a quantized linear with K inputs, N outputs and G groups in their natural order.

    Args:
        codes: [N, K] uint8. scales: [G, N]. zeros: [G, N] integers, stored unchanged.

    Returns:
        ``qweight`` int32 [K, N/8], ``qzeros`` int32 [G, N/8], ``scales`` float16 [G, N].
    """
    return {
        "qweight": pack(codes.t().contiguous()),
        "qzeros": pack(zeros),
        "scales": scales.to(torch.float16).contiguous(),
    }


def decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [N, K] float32 that a loader computes from the tensors of :func:`encode`."""
    codes = unpack(tensors["qweight"]).t()
    zeros, scales = unpack(tensors["qzeros"]).t(), tensors["scales"].float().t()
    size = codes.shape[1] // scales.shape[1]
    widened = (part.repeat_interleave(size, dim=1) for part in (scales, zeros.float()))
    scale, zero = widened
    return scale * (codes.float() - zero)


def quant_config(*, group_size: int, zero_point: bool, left_out: list[str] | None = None) -> dict[str, Any]:
    """``quant_config.json``, in AutoAWQ's own names.

    Args:
        left_out: full names of the block linears that are not quantized. Loaders also match parts of names, so
            ``gate`` alone would exclude ``gate_proj`` too.
    """
    return {
        "zero_point": zero_point,
        "q_group_size": group_size,
        "w_bit": BITS,
        "version": "GEMM",
        "modules_to_not_convert": left_out,
    }


def quantization_config(*, group_size: int, zero_point: bool, left_out: list[str] | None = None) -> dict[str, Any]:
    """``quantization_config`` of ``config.json`` for transformers, vLLM and TGI; arguments of :func:`quant_config`."""
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": "gemm",
        "modules_to_not_convert": left_out,
    }
