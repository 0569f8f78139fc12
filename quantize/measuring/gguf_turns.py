"""What turns tensors of a full-width GGUF back into the checkpoint's tensor that they were made of.

Found by comparing values: rows in another order, split over several tensors, last two dimensions swapped, all values
shifted or scaled. Exact agreement is tried first, because a shift by one lies within the rounding of large values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ReadPart = Callable[[str, int | None], Floats]

ROUNDING = 2.0**-8
"""Relative difference that two roundings to bfloat16 can make."""
FEWEST = 8
"""Values that have to agree before an unusual shift or scale is believed."""


@dataclass(frozen=True)
class Part:
    """One tensor of the file, or one matrix of a stack; ``swapped``: with its last two dimensions swapped."""

    name: str
    expert: int | None
    swapped: bool = False

    def of(self, values: Floats) -> Floats:
        return values.swapaxes(-1, -2) if self.swapped else values


@dataclass(frozen=True)
class Turn:
    """What turns converted tensors back into a tensor of the checkpoint.

    Attributes:
        parts: the converted tensors. shape: the checkpoint's.
        rows: for each row of the checkpoint's tensor, its place among the rows of all parts; None: all, in order.
        swapped: whether these rows are those of the checkpoint's tensor with its last two dimensions swapped.
        scale, shift: what the converter multiplied with and then added.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    rows: NDArray[np.int64] | None = None
    swapped: bool = False
    scale: float = 1.0
    shift: float = 0.0

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint stores a matrix as the transpose of the file's."""
        return self.swapped and len(self.shape) == 2

    def back(self, read: ReadPart) -> Floats:
        """The checkpoint's tensor from a file's."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swapped else self.shape
        if self.rows is None:
            (part,) = self.parts
            values = part.of(read(part.name, part.expert)).reshape(shape)
        else:
            pool = _pool([part.of(read(part.name, part.expert)) for part in self.parts], _width(shape))
            values = pool[self.rows].reshape(shape)
        values = values.swapaxes(-1, -2) if self.swapped else values
        return (values - self.shift) / self.scale if self.scale != 1 else values - self.shift


def find_turn(
    wanted: torch.Tensor, rounded: torch.dtype, parts: Sequence[tuple[str, int | None, Floats]]
) -> Turn | None:
    """What turns ``parts`` (name, matrix of a stack, values) into ``wanted``, or None.

    Args:
        rounded: what the converter rounded its values to.
    """
    stored = wanted if wanted.dtype in (torch.float16, torch.float32) else wanted.float()  # as the converter does
    values = _floats(stored.to(rounded))
    named = tuple(Part(name, expert) for name, expert, _ in parts)
    found = [tensor for _, _, tensor in parts]
    shape = tuple(wanted.shape)
    whole = list(_wholes(named, found, shape)) if len(parts) == 1 else []
    for turn, converted in whole:
        if np.array_equal(converted, values):
            return turn
        for shift in (1.0, -1.0):
            if np.array_equal(converted, _floats((stored + shift).to(rounded))):
                return Turn(turn.parts, shape, swapped=turn.swapped, shift=shift)
    for swapped in (False, True) if len(shape) > 1 else (False,):
        if gathered := _find_rows(named, found, values, swapped):
            return gathered
    fits = [fit for turn, converted in whole for fit in _fits(turn, converted, values)]
    return min(fits, key=lambda fit: fit[0])[1] if fits else None


def _floats(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.float().numpy()
    return values


def _wholes(named: Sequence[Part], found: Sequence[Floats], shape: tuple[int, ...]) -> Iterator[tuple[Turn, Floats]]:
    """The ways in which one converted tensor is the checkpoint's as a whole, before its values are looked at."""
    (part,), (values,) = named, found
    if values.size != int(np.prod(shape)):
        return
    if _squeezed(values.shape) == _squeezed(shape):
        yield Turn((part,), shape), values.reshape(shape)
    if len(shape) == 2 and values.shape == shape[::-1]:
        yield Turn((part,), shape, swapped=True), values.T


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _fits(turn: Turn, converted: Floats, wanted: Floats) -> Iterator[tuple[float, Turn]]:
    """Shifts and scales that explain the converted values up to rounding, each with the mean difference left."""
    left, right = converted.astype(np.float64), wanted.astype(np.float64)
    pairs = [(1.0, 0.0), (1.0, 1.0)]
    if right.size >= FEWEST:
        pairs.append((1.0, float(np.median(left - right))))
        nonzero = right != 0
        if nonzero.sum() >= FEWEST:
            pairs.append((float(np.median(left[nonzero] / right[nonzero])), 0.0))
    for scale, shift in pairs:
        if scale == 0:
            continue
        difference = np.abs(left - (right * scale + shift))
        allowed = ROUNDING * np.maximum(np.abs(right * scale), abs(shift)) + 1e-12
        if (difference <= allowed).all():
            yield float(difference.mean()), Turn(turn.parts, turn.shape, swapped=turn.swapped, scale=scale, shift=shift)


def _width(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def _pool(tensors: Sequence[Floats], width: int) -> Floats:
    rows = [tensor.reshape(-1, width) for tensor in tensors]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _find_rows(named: Sequence[Part], found: Sequence[Floats], values: Floats, swapped: bool) -> Turn | None:
    """A turn whose rows lie anywhere in the parts, bit for bit."""
    shape = values.shape
    rows = np.ascontiguousarray(values.swapaxes(-1, -2) if swapped else values)
    width = _width(rows.shape)
    rows = rows.reshape(-1, width)
    ways = []
    for tensor in found:
        lengths = tensor.shape[-2:]
        as_it_is = width == 1 or lengths[-1] == width
        turned = width > 1 and len(lengths) == 2 and lengths[0] == width
        ways.append([*([False] if as_it_is else []), *([True] if turned else [])])
    for way in itertools.product(*ways):
        parts = tuple(Part(part.name, part.expert, turned) for part, turned in zip(named, way, strict=True))
        pool = _pool([part.of(tensor) for part, tensor in zip(parts, found, strict=True)], width)
        index = _places(np.ascontiguousarray(pool), rows)
        if index is not None:
            return Turn(parts, shape, rows=index, swapped=swapped)
    return None


def _places(pool: Floats, rows: Floats) -> NDArray[np.int64] | None:
    """``index`` with ``pool[index] == rows``, bit for bit, or None."""
    if len(pool) < len(rows):
        return None
    hashes, wanted = _hashes(pool), _hashes(rows)
    order = np.argsort(hashes, kind="stable")
    places = np.searchsorted(hashes, wanted, sorter=order)
    index: NDArray[np.int64] = order[np.minimum(places, len(order) - 1)].astype(np.int64)
    return index if np.array_equal(pool[index], rows) else None


def _hashes(rows: Floats) -> NDArray[np.uint64]:
    factors = np.random.Generator(np.random.PCG64(0)).integers(2**63, size=rows.shape[1], dtype=np.uint64) * 2 + 1
    found = np.empty(len(rows), dtype=np.uint64)
    step = max(1, 2**22 // rows.shape[1])
    for start in range(0, len(rows), step):
        bits = (rows[start : start + step] + np.float32(0)).view(np.uint32)  # both zeros alike
        found[start : start + step] = (bits.astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
    return found
