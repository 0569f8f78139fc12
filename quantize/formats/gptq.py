"""The GPTQ checkpoint format: tensors of a linear, and the config that loaders read.

Source: AutoGPTQ 0.7.1 (format ``gptq``, "v1") and GPTQModel (``gptq_v2``), as their loaders read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantize.formats.packing import pack, unpack

Tensors = dict[str, torch.Tensor]


def encode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    *,
    bits: int,
    checkpoint_format: str = "gptq",
) -> Tensors:
    """The tensors of a quantized linear with K inputs, N outputs and G groups.

    Args:
        codes: [N, K] uint8. scales: [G, N]. zeros: [G, N] integers. g_idx: [K].
        checkpoint_format: ``gptq`` stores zeros minus one, ``gptq_v2`` stores them unchanged.

    Returns:
        ``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [G, N*bits/32], ``scales`` float16 [G, N],
        ``g_idx`` int32 [K].
    """
    stored = zeros.to(torch.int32)
    if checkpoint_format == "gptq":
        stored = (stored - 1) % 2**bits
    return {
        "qweight": pack(codes.t(), bits),
        "qzeros": pack(stored.t(), bits).t().contiguous(),
        "scales": scales.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32).contiguous(),
    }


def convert_zeros(qzeros: torch.Tensor, bits: int, stored: str, wanted: str) -> torch.Tensor:
    """Convert packed zero points from the ``checkpoint_format`` ``stored`` to ``wanted``.

    Raises:
        ValueError: either format is unknown.
    """
    for name in (stored, wanted):
        if name not in {"gptq", "gptq_v2"}:
            raise ValueError(f"checkpoint_format '{name}' is neither gptq nor gptq_v2")
    if stored == wanted:
        return qzeros
    zeros = unpack(qzeros.t().contiguous(), bits).to(torch.int32) + (1 if stored == "gptq" else -1)
    return pack(zeros % 2**bits, bits).t().contiguous()


def decode(tensors: Mapping[str, torch.Tensor], bits: int, checkpoint_format: str = "gptq") -> torch.Tensor:
    """The weight [N, K] float32 that a loader computes from the tensors of :func:`encode`."""
    codes = unpack(tensors["qweight"], bits).t()
    zeros = unpack(tensors["qzeros"].t().contiguous(), bits).to(torch.int32)
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) % 2**bits
    index = tensors["g_idx"].long()
    scales = tensors["scales"].float().t()
    return scales[:, index] * (codes.float() - zeros.float()[:, index])


def selection(modules: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """Keys of a config by which loaders know which linears are quantized.

    Args:
        modules: name suffixes of the quantized linears, if some linears of a block are not quantized. optimum compares
            the end of a linear's name, vLLM looks for it anywhere in the name.
        left_out: regular expressions, matched from the start, of modules that are not quantized; GPTQModel and vLLM
            read them as ``dynamic`` rules with ``-:``.
    """
    return {
        **({"modules_in_block_to_quantize": [list(modules)]} if modules else {}),
        **({"dynamic": {f"-:{pattern}": {} for pattern in left_out}} if left_out else {}),
    }


def quantize_config(
    *,
    bits: int,
    group_size: int,
    desc_act: bool | str,
    act_group_aware: bool,
    sym: bool,
    damp_percent: float,
    checkpoint_format: str,
    true_sequential: bool,
    quantizers: list[str],
    selected: Mapping[str, Any],
) -> dict[str, Any]:
    """``quantize_config.json``, and the same object as ``quantization_config`` in ``config.json``.

    The union of the keys that AutoGPTQ, GPTQModel, transformers, vLLM, TGI and ExLlama read. Static act-order is
    written as no act-order, because its groups are in the natural order.

    Args:
        selected: keys that say which linears are quantized; see :func:`selection`.
    """
    dynamic = desc_act is True
    return {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": damp_percent,
        "desc_act": dynamic,
        "static_groups": desc_act == "static",
        "act_group_aware": act_group_aware and desc_act is False,
        "sym": sym,
        "lm_head": False,
        "true_sequential": true_sequential,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        **selected,
        "meta": {
            "quantizer": quantizers,
            "damp_percent": damp_percent,
            "static_groups": desc_act == "static",
            "true_sequential": true_sequential,
        },
    }
