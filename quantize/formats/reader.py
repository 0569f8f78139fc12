"""Read the weights of a finished branch from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantize.formats import awq, compressed, gptq
from quantize.formats.names import is_file_name
from quantize.formats.tensor_file import TensorFile
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME

PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    compressed.METHOD: ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}
"""By method, the tensors that store a linear's weight. The first exists for exactly the quantized linears;
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
    """Reads the tensors of a branch's folder one at a time, and dequantizes its linears.

    The header of each shard is read once, with the first of its tensors. No file stays open.

    Raises:
        OSError, KeyError, ValueError: the folder is not a branch in a format of :data:`PARTS`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _json(folder / "config.json").get("quantization_config")
        if not isinstance(config, dict):
            raise ValueError(f"{folder}: its config.json has no quantization_config")
        self.method = str(config.get("quant_method"))
        if self.method not in PARTS:
            raise ValueError(f"{folder}: quant_method '{self.method}' is not one of {', '.join(PARTS)}")
        bits = compressed.bits_of(config) if self.method == compressed.METHOD else config.get("bits")
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"{folder}: quantization_config.bits is not 2, 3, 4 or 8")
        self.bits, self.checkpoint_format = int(bits), str(config.get("checkpoint_format", "gptq"))
        index = folder / INDEX_NAME
        shards = _json(index).get("weight_map") if index.is_file() else {}
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and "/" not in name and is_file_name(name) for name in shards.values()
        ):
            raise ValueError(f"{index}: its weight_map names something other than a file in this folder")
        self._shard_of: dict[str, str] = shards
        self._files: dict[str, TensorFile] = {}

    @cached_property
    def activation_scales(self) -> dict[str, torch.Tensor]:
        """AWQ: scales that loaders divide the outputs of weightless modules (activations) by, by module."""
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
        return frozenset(self._file(SINGLE_NAME).names)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored.

        Raises:
            OSError: its file cannot be read. ValueError: the file lacks the tensor, or is damaged.
        """
        file = self._file(self._shard_of.get(name, SINGLE_NAME))
        if name not in file:
            raise ValueError(f"{file.path}: contains no tensor {name}")
        try:
            return file.read(name)
        except KeyError as error:
            raise ValueError(f"{file.path}: its tensor {name} has the unknown type {error}") from None
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None

    def _file(self, shard: str) -> TensorFile:
        if shard not in self._files:
            try:
                self._files[shard] = TensorFile(self.folder / shard)
            except ValueError as error:
                raise ValueError(f"{self.folder / shard}: {error}") from None
        return self._files[shard]

    def weight(self, module: str) -> torch.Tensor:
        """The weight [out_features, in_features] float32 that a loader computes for a quantized linear."""
        tensors = {}
        for part in PARTS[self.method]:
            if part != "weight_zero_point" or f"{module}.{part}" in self._stored:
                tensors[part] = self.tensor(f"{module}.{part}")
        return decode(self.method, tensors, self.bits, self.checkpoint_format)


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return data
