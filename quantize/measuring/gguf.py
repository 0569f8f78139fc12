"""Tensors of a GGUF level under the names and in the order of the checkpoint that it was made of.

llama.cpp's converter renames tensors, reorders rows (q and k of the Llama family), adds one to some norms. Nothing
here knows which architecture does what: each tensor of the full-width conversion is laid beside the source's, and what
turns one into the other is found by comparing their values, once, for all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.errors import GgufRunError
from quantize.formats.gguf_reader import open_gguf
from quantize.gguf.stacks import find_stacks
from quantize.source.routing import expert_of

ReadSource = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Turn:
    """What turns a converted tensor back: rows in another order (None: as they are), a shift, a transposition.

    Attributes:
        expert: which matrix of a stack of experts it is.
    """

    name: str
    expert: int | None = None
    rows: NDArray[np.int64] | None = None
    shift: float = 0.0
    transposed: bool = False

    def back(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        values = values if self.rows is None else values[self.rows]
        return (values.T if self.transposed else values) - self.shift


class GgufFile:
    """A GGUF, whole or in parts; its tensors dequantized one at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            readers = [open_gguf(path) for path in paths]
        except (ValueError, OSError) as error:
            raise GgufRunError(f"{paths[0]}: cannot be read: {error}") from None
        self.path = paths[0]
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dtype(self, name: str) -> torch.dtype:
        """What the values of a full-width tensor were rounded to."""
        kind = self._tensors[name].tensor_type.name if name in self._tensors else ""
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)

    def tensor(self, name: str, expert: int | None = None) -> NDArray[np.float32]:
        """float32 values in the row-major order of torch; of one ``expert`` of a stack alone.

        Raises:
            GgufError: the file has no such tensor.
        """
        from gguf.quants import dequantize

        if name not in self._tensors:
            raise GgufRunError(f"{self.path}: holds no tensor {name}")
        tensor = self._tensors[name]
        shape, data = tuple(int(length) for length in reversed(tensor.shape)), tensor.data
        if expert is not None:
            shape, data = shape[1:], data[expert]
        return dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)


class Alignment:
    """How the tensors of a conversion lie to those of its source.

    Args:
        conversion: the full-width file that all levels are made from.
        converted: for each tensor of the checkpoint, the GGUF tensors it went into.
        read: the source's tensors by name.
    """

    def __init__(self, conversion: Path, converted: Mapping[str, list[str]], read: ReadSource) -> None:
        self._conversion, self._converted, self._read = GgufFile([conversion]), converted, read
        self._stacks = find_stacks(converted)
        self._known: dict[str, Turn] = {}

    def turn(self, name: str) -> Turn | None:
        """What turns a converted tensor into the checkpoint's ``name``; None where the conversion has none.

        Raises:
            GgufError: the converter did something to it that is not known here.
        """
        expert = expert_of(name)
        if name not in self._converted and expert is None:
            return None
        if name not in self._known:
            target, number = self._target(name)
            wanted = self._read(name).to(self._conversion.dtype(target)).float().numpy()
            turn = _find_turn(name, target, wanted, self._conversion.tensor(target, number))
            self._known[name] = replace(turn, expert=number)
        return self._known[name]

    def _target(self, name: str) -> tuple[str, int | None]:
        """The converted tensor that a checkpoint's went into, and which matrix of it."""
        if expert := expert_of(name):
            mixture, number, rest = expert
            stack = self._stacks.get((mixture, rest.removesuffix(".weight")))
            if stack is None:
                raise GgufRunError(f"{name}: the converter stacked the experts in a way that is not known here")
            return stack, number
        targets = self._converted[name]
        if len(targets) != 1:
            raise GgufRunError(f"{name} was split into {', '.join(targets)}, which cannot be put together again")
        return targets[0], None

    def source(self, name: str) -> torch.Tensor:
        return self._read(name)


class LevelReader:
    """Weights of one level, as a reader of measured branches gives them."""

    def __init__(self, paths: Sequence[Path], alignment: Alignment) -> None:
        self._file, self._alignment = GgufFile(paths), alignment

    def weight(self, module: str) -> torch.Tensor:
        """A linear's weight, [out_features, in_features] float32, also where the checkpoint stores its transpose."""
        turn = self._alignment.turn(f"{module}.weight")
        weight = self.tensor(f"{module}.weight")
        return weight.t().contiguous() if turn is not None and turn.transposed else weight

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor as the checkpoint stores it; what the file does not carry (constants) is the source's."""
        turn = self._alignment.turn(name)
        if turn is None:
            return self._alignment.source(name)
        return torch.from_numpy(np.ascontiguousarray(turn.back(self._file.tensor(turn.name, turn.expert))))


def _find_turn(name: str, target: str, wanted: NDArray[np.float32], found: NDArray[np.float32]) -> Turn:
    if wanted.ndim == 2 and found.ndim == 2 and found.shape[0] > wanted.shape[0] and found.shape[1] == wanted.shape[1]:
        # the vocabulary is padded in the file
        rows = np.arange(wanted.shape[0])
        if _same(found[rows], wanted):
            return Turn(target, rows=rows)
    if found.size == wanted.size:
        found = found.reshape(wanted.shape) if wanted.ndim == 1 else found
        if found.shape == wanted.shape:
            if _same(found, wanted):
                return Turn(target)
            if _same(found - 1, wanted):
                return Turn(target, shift=1.0)
            rows_found = _rows(found, wanted)
            if rows_found is not None:
                return Turn(target, rows=rows_found)
        if found.shape == wanted.T.shape:
            if _same(found.T, wanted):
                return Turn(target, transposed=True)
            rows_found = _rows(found, wanted.T)
            if rows_found is not None:
                return Turn(target, rows=rows_found, transposed=True)
    raise GgufRunError(f"{name}: the converter made {target} of it in a way that cannot be turned back")


def _same(left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    """Equal up to the rounding of a 16-bit type."""
    return bool(np.allclose(left, right, rtol=2**-7, atol=1e-6 * float(np.abs(right).max(initial=0)) + 1e-12))


def _rows(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.int64] | None:
    """``index`` with ``found[index] == wanted``, or None. Rows are paired by their order along a random direction."""
    left, right = found.reshape(len(found), -1), wanted.reshape(len(wanted), -1)
    direction = np.random.Generator(np.random.PCG64(0)).standard_normal(left.shape[1]).astype(np.float64)
    index = np.empty(len(left), dtype=np.int64)
    index[np.argsort(right @ direction, kind="stable")] = np.argsort(left @ direction, kind="stable")
    return index if _same(left[index], right) else None


def open_levels(
    files: Mapping[str, Sequence[Path]], conversion: Path, converted: Mapping[str, list[str]], read: ReadSource
) -> dict[str, Any]:
    """Readers of several levels of one conversion, by their labels."""
    alignment = Alignment(conversion, converted, read)
    return {label: LevelReader(paths, alignment) for label, paths in files.items()}
