"""Weights of a finished branch, read back from its own bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantize.formats import awq, compressed, gptq
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    compressed.METHOD: ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}
"""By method, what a linear's weight is stored as. The first is there for every quantized linear and for no other;
``weight_zero_point`` only with zero points."""


def decode(
    method: str, tensors: Mapping[str, torch.Tensor], bits: int, checkpoint_format: str = "gptq"
) -> torch.Tensor:
    """The weight [N, K] float32 that a loader computes from a linear's :data:`PARTS`."""
    if method == "awq":
        return awq.decode(tensors)
    if method == "gptq":
        return gptq.decode(tensors, bits, checkpoint_format)
    return compressed.decode(tensors, bits)


class BranchReader:
    """Tensors of a branch's folder, one at a time; its linears dequantized.

    Raises:
        OSError, KeyError, ValueError: the folder is no branch of a format in :data:`PARTS`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        self.method = str(config["quant_method"])
        if self.method not in PARTS:
            raise ValueError(f"{folder}: quant_method '{self.method}' is none of {', '.join(PARTS)}")
        self.bits = compressed.bits_of(config) if self.method == compressed.METHOD else int(config["bits"])
        self.checkpoint_format = str(config.get("checkpoint_format", "gptq"))
        index = folder / INDEX_NAME
        self._shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}

    @cached_property
    def activation_scales(self) -> dict[str, torch.Tensor]:
        """AWQ: what loaders divide the outputs of modules by that hold no weight of their own, by module."""
        names = self._stored
        found = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
        return {module: self.tensor(f"{module}.scales") for module in sorted(found) if f"{module}.qweight" not in names}

    @property
    def packed(self) -> set[str]:
        """The quantized linears."""
        mark = f".{PARTS[self.method][0]}"
        return {name.removesuffix(mark) for name in self._stored if name.endswith(mark)}

    @cached_property
    def _stored(self) -> frozenset[str]:
        if self._shard_of:
            return frozenset(self._shard_of)
        with safe_open(self.folder / SINGLE_NAME, framework="pt") as file:
            return frozenset(file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        with safe_open(self.folder / self._shard_of.get(name, SINGLE_NAME), framework="pt") as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> torch.Tensor:
        """The weight [out_features, in_features] float32 that a loader computes for a quantized linear."""
        tensors = {}
        for part in PARTS[self.method]:
            if part != "weight_zero_point" or f"{module}.{part}" in self._stored:
                tensors[part] = self.tensor(f"{module}.{part}")
        return decode(self.method, tensors, self.bits, self.checkpoint_format)
