"""Weights of a finished GPTQ branch, read back from its own bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from quantize.formats.gptq import decode
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqReader:
    """Dequantized linears of a branch's folder, one at a time.

    Raises:
        OSError, KeyError, ValueError: the folder is not a GPTQ branch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
        self.bits, self.checkpoint_format = int(config["bits"]), str(config["checkpoint_format"])
        index = folder / INDEX_NAME
        self._shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        with safe_open(self.folder / self._shard_of.get(name, SINGLE_NAME), framework="pt") as file:
            return file.get_tensor(name)

    def weight(self, module: str) -> torch.Tensor:
        """The weight [out_features, in_features] float32 that a loader computes for a quantized linear."""
        return decode({part: self.tensor(f"{module}.{part}") for part in PARTS}, self.bits, self.checkpoint_format)
