"""The ``pack-quantized`` format of compressed-tensors, which vLLM reads: tensors of a linear, and its config.

Source: compressed-tensors 0.19, as llm-compressor writes it and vLLM and transformers read it. For N outputs, K inputs
and G groups: ``weight_packed`` int32 [N, K*bits/32], low bits first, codes offset by 2^(bits-1); ``weight_scale``
[N, G] in the model's dtype; ``weight_shape`` int64 [2]; with zero points ``weight_zero_point`` int32 [N*bits/32, G],
with the same offset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantize.formats.packing import unpack

METHOD = "compressed-tensors"
VERSION = "0.19.0"


def decode(tensors: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The weight [N, K] float32 that a loader computes.

    Raises:
        ValueError: ``weight_shape`` differs from the shape of the codes.
    """
    codes = unpack(tensors["weight_packed"].t().contiguous(), bits).t().float()
    if tensors["weight_shape"].tolist() != list(codes.shape):
        raise ValueError(f"weight_shape is {tensors['weight_shape'].tolist()}, the codes are {list(codes.shape)}")
    scale = tensors["weight_scale"].float()
    size = codes.shape[1] // scale.shape[1]
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in tensors:
        zero = unpack(tensors["weight_zero_point"], bits).float()
    return scale.repeat_interleave(size, dim=1) * (codes - zero.repeat_interleave(size, dim=1))


def quantization_config(
    *, bits: int, group_size: int, symmetric: bool, static_order: bool, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """``quantization_config`` of ``config.json`` for a model with every linear but the output head quantized.

    Args:
        left_out: names of further modules that are not quantized, or ``re:`` and a regular expression.
    """
    weights: dict[str, Any] = {
        "actorder": "static" if static_order else None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None if group_size == -1 else group_size,
        "num_bits": bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "channel" if group_size == -1 else "group",
        "symmetric": symmetric,
        "type": "int",
        "zp_dtype": None if symmetric else "torch.int8",
    }
    group = {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", *left_out],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def bits_of(config: Mapping[str, Any]) -> int:
    """The bit width in a ``quantization_config`` of this format.

    Raises:
        KeyError, TypeError: the config is of another format.
    """
    return int(config["config_groups"]["group_0"]["weights"]["num_bits"])
