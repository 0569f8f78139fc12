"""Run finished branches and levels from their files: tensors are dequantized on reading, blocks streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from quantize.calibration.forward import Activations
from quantize.formats.reader import PARTS, BranchReader
from quantize.formats.tensors import TensorSpec
from quantize.gguf.convert import Conversion, outtype_of
from quantize.measuring.gguf import open_levels
from quantize.measuring.quality import branch_logits, divided_activations
from quantize.source.architecture import build_empty, match_names
from quantize.source.checkpoint import Checkpoint, read_header
from quantize.source.resolved import Source
from quantize.source.streamed import StreamedModel


class _Dequantized(StreamedModel):
    """A streamed model whose weights come from a branch's reader."""

    def __init__(self, source: Source, reader: BranchReader, packed: set[str], turned: set[str]) -> None:
        self._reader, self._packed, self._turned = reader, packed, turned
        super().__init__(source, torch.float32, torch.device("cpu"), head=True)

    def read(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in self._packed:
            return self._reader.tensor(name)
        weight = self._reader.weight(module)
        return weight.t() if module in self._turned else weight


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [length, vocabulary] of a branch for token ids, with one block in memory at a time.

    Raises:
        SourceError, OSError, KeyError, ValueError: it cannot be read, or its architecture cannot be streamed.
    """
    reader = BranchReader(folder)
    stored: dict[str, TensorSpec] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= read_header(file)
    packed = reader.packed
    tensors = {name: spec for name, spec in stored.items() if name.rpartition(".")[0] not in packed}
    tensors |= {f"{name}.bias": stored[f"{name}.bias"] for name in packed if f"{name}.bias" in stored}
    named = {f"{module}.weight": TensorSpec("F32", (0, 0)) for module in packed}
    turned = _turned(folder, Checkpoint(_config(folder), {**tensors, **named}, folder))
    for module in packed:
        weight = reader.weight(module)
        shape = tuple(weight.t().shape if module in turned else weight.shape)
        tensors[f"{module}.weight"] = TensorSpec("F32", shape, stored[f"{module}.{PARTS[reader.method][0]}"].file)
    checkpoint = Checkpoint(_config(folder), tensors, folder, tuple(sorted({spec.file for spec in stored.values()})))
    model = _Dequantized(Source(str(folder), folder.name, checkpoint), reader, packed, turned)
    state = Activations(model, np.array([ids], dtype=np.int64), 1)
    for index in range(len(model)):
        with model.block(index) as block, divided_activations(model, index, block, reader.activation_scales):
            state.advance(index, block)
    return model.logits(state.ids, state.hidden)[0].float()


def _turned(folder: Path, checkpoint: Checkpoint) -> set[str]:
    """Names of the linears that the architecture keeps as [in_features, out_features]."""
    model = build_empty(folder, str(folder), checkpoint, torch.float32, False)
    names = match_names(model, checkpoint.tensors)
    turned = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D))
    return {names[name].removesuffix(".weight") for name in turned if name in names}


def level_logits(source: Source, files: Sequence[Path]) -> Callable[[list[int]], torch.Tensor]:
    """A function from token ids to the logits of a GGUF level, with its tensors converted back to the source's layout.

    Raises:
        GgufError: llama.cpp is missing, or the source cannot be converted for the comparison.
    """
    conversion = Conversion(source, outtype_of(source.checkpoint, "auto"), source.short_name, {})
    model = StreamedModel(source, torch.float32, torch.device("cpu"), head=True)
    readers = open_levels({"level": files}, conversion.make(), conversion.header().converted, model.read)
    return lambda ids: branch_logits(model, ids, readers["level"])


def _config(folder: Path) -> dict[str, Any]:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    return dict(config)
