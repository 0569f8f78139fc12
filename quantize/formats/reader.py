"""Weights of a finished branch, read back from its own bytes."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantize.formats import awq, gptq
from quantize.formats.manifest_schema import is_file_name
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME

PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}


class BranchReader:
    """Tensors of a branch's folder, one at a time; its linears dequantized.

    Raises:
        OSError, KeyError, ValueError: the folder is neither a GPTQ nor an AWQ branch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _json(folder / "config.json").get("quantization_config")
        if not isinstance(config, dict):
            raise ValueError(f"{folder}: its config.json has no quantization_config")
        self.method = str(config.get("quant_method"))
        if self.method not in PARTS:
            raise ValueError(f"{folder}: quant_method '{self.method}' is neither gptq nor awq")
        if config.get("bits") not in (2, 3, 4, 8):
            raise ValueError(f"{folder}: quantization_config.bits is none of 2, 3, 4 and 8")
        self.bits, self.checkpoint_format = int(config["bits"]), str(config.get("checkpoint_format", "gptq"))
        index = folder / INDEX_NAME
        shards = _json(index).get("weight_map") if index.is_file() else {}
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and "/" not in name and is_file_name(name) for name in shards.values()
        ):
            raise ValueError(f"{index}: its weight_map names something that is no file beside it")
        self._shard_of: dict[str, str] = shards

    @cached_property
    def activation_scales(self) -> dict[str, torch.Tensor]:
        """AWQ: what loaders divide the outputs of modules by that hold no weight of their own, by module."""
        names = set(self._shard_of) or set(self._names())
        found = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
        return {module: self.tensor(f"{module}.scales") for module in sorted(found) if f"{module}.qweight" not in names}

    def _names(self) -> list[str]:
        with safe_open(self.folder / SINGLE_NAME, framework="pt") as file:
            return list(file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        try:
            with safe_open(self.folder / self._shard_of.get(name, SINGLE_NAME), framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(str(error)) from None

    def weight(self, module: str) -> torch.Tensor:
        """The weight [out_features, in_features] float32 that a loader computes for a quantized linear."""
        tensors = {part: self.tensor(f"{module}.{part}") for part in PARTS[self.method]}
        if self.method == "awq":
            return awq.decode(tensors)
        return gptq.decode(tensors, self.bits, self.checkpoint_format)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is no JSON object")
    return data
