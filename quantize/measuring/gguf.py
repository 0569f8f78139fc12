"""Tensors of a GGUF level under the names and in the order of the checkpoint that it was made of.

llama.cpp's converter renames tensors, reorders rows (q and k of the Llama family), adds one to some norms, splits and
stacks. Nothing here knows which architecture does what: each tensor of the full-width conversion is compared with the
source's (``gguf_turns.py``), and what turns one into the other is found by comparing their values, once, for all
levels. What cannot be turned back but lies in a level as it lies in the conversion is not quantized: the source's own
values are taken for it.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.errors import GgufRunError
from quantize.formats.gguf_reader import open_gguf
from quantize.measuring.gguf_turns import Turn, find_turn
from quantize.source.routing import expert_of

ReadSource = Callable[[str], torch.Tensor]


class GgufFile:
    """A GGUF, whole or in parts; its tensors dequantized one at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            readers = [open_gguf(path) for path in paths]
        except (ValueError, OSError) as error:
            raise GgufRunError(f"{paths[0]}: cannot be read: {error}") from None
        self.path = paths[0]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        self._maps = [reader.data for reader in readers]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def type_of(self, name: str) -> str:
        """A tensor's type, such as ``Q4_K``; empty if the file has no such tensor."""
        return str(self._tensors[name].tensor_type.name) if name in self._tensors else ""

    def dtype(self, name: str) -> torch.dtype:
        """What the values of a full-width tensor were rounded to."""
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(self.type_of(name), torch.float32)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape in the row-major order of torch.

        Raises:
            GgufError: the file has no such tensor.
        """
        return tuple(int(length) for length in reversed(self._find(name).shape))

    def tensor(self, name: str, expert: int | None = None) -> NDArray[np.float32]:
        """float32 values in the row-major order of torch; of one ``expert`` of a stack alone.

        Raises:
            GgufError: the file has no such tensor.
        """
        from gguf.quants import dequantize

        tensor, shape = self._find(name), self.shape(name)
        data = tensor.data
        if expert is not None:
            shape, data = shape[1:], data[expert]
        return dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)

    def give_back(self) -> None:
        """Return the memory of all that was read, which counts against a limit as long as it is mapped."""
        for data in self._maps:
            mapped = getattr(data, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def has_same(self, name: str, other: GgufFile) -> bool:
        """Whether both files have this tensor with the same type and bytes."""
        if name not in self or name not in other:
            return False
        left, right = self._tensors[name], other._tensors[name]
        return bool(left.tensor_type == right.tensor_type and np.array_equal(left.data, right.data))

    def _find(self, name: str) -> Any:
        if name not in self._tensors:
            raise GgufRunError(f"{self.path}: holds no tensor {name}")
        return self._tensors[name]


class Alignment:
    """How the tensors of a conversion correspond to those of its source.

    Args:
        conversion: the full-width file that all levels are made from.
        converted: for each tensor of the checkpoint, the GGUF tensors that it went into.
        read: the source's tensors by name.
    """

    def __init__(self, conversion: Path, converted: Mapping[str, list[str]], read: ReadSource) -> None:
        self.conversion, self._converted, self._read = GgufFile([conversion]), converted, read
        self._known: dict[str, Turn | None] = {}

    def targets(self, name: str) -> list[str]:
        """The GGUF tensors that a checkpoint's tensor went into."""
        return self._converted.get(name, [])

    def turn(self, name: str) -> Turn | None:
        """What turns converted tensors into the checkpoint's ``name``; None where nothing known here does."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> Turn | None:
        file, targets, wanted = self.conversion, self.targets(name), self._read(name)
        expert = expert_of(name)
        if expert and len(targets) == 1:
            shape = file.shape(targets[0])
            if len(shape) == wanted.dim() + 1 and expert[1] < shape[0]:
                # one matrix of a stack; in the experts' order almost always
                others = (number for number in range(shape[0]) if number != expert[1])
                for number in (expert[1], *others):
                    parts = [(targets[0], number, file.tensor(targets[0], number))]
                    if turn := find_turn(wanted, file.dtype(targets[0]), parts):
                        return turn
                return None
        return find_turn(wanted, file.dtype(targets[0]), [(target, None, file.tensor(target)) for target in targets])

    def source(self, name: str) -> torch.Tensor:
        return self._read(name)

    def refusal(self, name: str) -> GgufRunError:
        """The error for a tensor that cannot be turned back."""
        made = " and ".join(self.targets(name))
        return GgufRunError(f"{name}: the converter made {made} of it in a way that cannot be turned back")


class LevelReader:
    """Weights of one level, as a reader of measured branches gives them."""

    def __init__(self, paths: Sequence[Path], alignment: Alignment) -> None:
        self._file, self._alignment = GgufFile(paths), alignment

    def weight(self, module: str) -> torch.Tensor:
        """A linear's weight, [out_features, in_features] float32, also where the checkpoint stores its transpose."""
        name = f"{module}.weight"
        weight = self.tensor(name)
        turn = self._alignment.turn(name) if self._alignment.targets(name) else None
        return weight.t().contiguous() if turn is not None and turn.transposed else weight

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor as the checkpoint stores it; what the file does not carry (constants) is the source's.

        Raises:
            GgufError: the converter changed it in an unknown way, and the level has it quantized.
        """
        alignment = self._alignment
        targets = alignment.targets(name)
        if not targets:
            return alignment.source(name)
        turn = alignment.turn(name)
        if turn is not None:
            return torch.from_numpy(np.ascontiguousarray(turn.back(self._file.tensor)))
        if all(self._file.has_same(target, alignment.conversion) for target in targets):
            return alignment.source(name)
        raise alignment.refusal(name)


def open_levels(
    files: Mapping[str, Sequence[Path]], conversion: Path, converted: Mapping[str, list[str]], read: ReadSource
) -> dict[str, Any]:
    """Readers of several levels of one conversion, by their labels."""
    alignment = Alignment(conversion, converted, read)
    return {label: LevelReader(paths, alignment) for label, paths in files.items()}


def check_levels_can_be_read_back(
    conversion: Path, converted: Mapping[str, list[str]], read: ReadSource, quantized: Collection[str]
) -> None:
    """Check, before levels are made, that they can be measured. Of alike tensors of all blocks the first is checked.

    Args:
        quantized: GGUF tensors that some level has in another type than the conversion.

    Raises:
        GgufError: one of them cannot be turned back.
    """
    alignment = Alignment(conversion, converted, read)
    seen: set[object] = set()
    for name, targets in converted.items():
        kind = re.sub(r"\d+", "N", name)
        if kind not in seen and any(target in quantized for target in targets):
            seen.add(kind)
            if alignment.turn(name) is None:
                raise alignment.refusal(name)
