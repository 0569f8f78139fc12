"""ggml's block types as numbers: codes, integer scales and minima, and the float16 values above them, and back again.

A block of a row holds a float16 ``d`` and, in some types, ``dmin``. K-quants and IQ4_XS divide a block of 256 values
into groups of 16 or 32, each with an integer scale and, in some types, an integer minimum; a legacy block of 32 values
is one group whose scale is 1. The value is ``d * scale * level - dmin * minimum``, where ``level`` is the code itself,
or the code's entry in a codebook. :func:`encode` gives the bytes that :func:`decode` read, bit for bit.

Format: ggml-common.h and ggml-quants.c of llama.cpp (the pinned llama-cpp-python).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int16]
Halves = NDArray[np.float16]
Floats = NDArray[np.float32]

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for, ascending."""
PACKED_SCALES = 12  # bytes in which Q4_K and Q5_K hold eight scales and eight minima of six bits


@dataclass(frozen=True)
class Plane:
    """Some bits of every number of a block.

    Attributes:
        start, nbytes: where they lie in the block.
        bits: how many of each number. width: bytes in a run; the numbers in the lowest bits of a run's bytes come
            first, then those in the next higher bits.
    """

    start: int
    nbytes: int
    bits: int
    width: int

    @property
    def _shifts(self) -> Bytes:
        return np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]

    def unpack(self, blocks: Bytes) -> Integers:
        """The bits of [B, nbytes] blocks as numbers, [B, count]."""
        runs = blocks[:, self.start : self.start + self.nbytes].reshape(len(blocks), -1, 1, self.width)
        mask = np.uint8((1 << self.bits) - 1)
        return ((runs >> self._shifts) & mask).reshape(len(blocks), -1).astype(np.int16)

    def pack(self, numbers: Integers, blocks: Bytes) -> None:
        """Write the lowest bits of numbers [B, count] into ``blocks`` [B, nbytes]."""
        mask = (1 << self.bits) - 1
        runs = (numbers & mask).astype(np.uint8).reshape(len(blocks), -1, 8 // self.bits, self.width)
        packed = np.bitwise_or.reduce(runs << self._shifts, axis=2)
        blocks[:, self.start : self.start + self.nbytes] = packed.reshape(len(blocks), -1)


@dataclass(frozen=True)
class BlockType:
    """How a type lays out a block.

    Attributes:
        size, nbytes: values and bytes of a block. group: values with one scale.
        codes: the planes of the codes, low bits first. lowest, highest: smallest and largest code; what is stored is
            the code minus ``lowest`` unless ``signed``.
        d, dmin: offsets of the float16 values; ``dmin`` None where there is none. added: whether the value at ``dmin``
            is added, so that it is -dmin.
        scales: the planes of the integer scales, and after them of the minima where ``minima``; none in legacy types.
        lowest_scale, highest_scale: their range, that of the minima too.
        codebook: what codes stand for; None for the codes themselves.
        signed: whether codes are stored as they are, in two's complement.
    """

    size: int
    nbytes: int
    group: int
    codes: tuple[Plane, ...]
    lowest: int
    highest: int
    d: int
    dmin: int | None = None
    added: bool = False
    scales: tuple[Plane, ...] = ()
    minima: bool = False
    lowest_scale: int = 1
    highest_scale: int = 1
    codebook: tuple[int, ...] | None = None
    signed: bool = False

    @property
    def has_scales(self) -> bool:
        """Whether groups have integer scales of their own."""
        return self.lowest_scale != self.highest_scale


def _legacy(nbytes: int, data: int, lowest: int, highest: int, *, high: int | None = None) -> BlockType:
    """A block of 32: nibbles at ``data``, and at ``high`` 32 bits that are the fifth bits."""
    planes = (Plane(data, 16, 4, 16),) + (() if high is None else (Plane(high, 4, 1, 1),))
    return BlockType(32, nbytes, 32, planes, lowest, highest, d=0)


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": _legacy(18, 2, -8, 7),
    "Q4_1": replace(_legacy(20, 4, 0, 15), dmin=2, added=True),
    "Q5_0": _legacy(22, 6, -16, 15, high=2),
    "Q5_1": replace(_legacy(24, 8, 0, 31, high=4), dmin=2, added=True),
    "Q8_0": BlockType(32, 34, 32, (Plane(2, 32, 8, 32),), -127, 127, d=0, signed=True),
    "IQ4_NL": replace(_legacy(18, 2, 0, 15), codebook=CODEBOOK),
    "IQ4_XS": BlockType(
        256, 136, 32, (Plane(8, 128, 4, 16),), 0, 15, d=0,
        scales=(Plane(4, 4, 4, 1), Plane(2, 2, 2, 1)), lowest_scale=-32, highest_scale=31, codebook=CODEBOOK,
    ),
    "Q2_K": BlockType(
        256, 84, 16, (Plane(16, 64, 2, 32),), 0, 3, d=80, dmin=82,
        scales=(Plane(0, 16, 4, 16),), minima=True, lowest_scale=0, highest_scale=15,
    ),
    "Q3_K": BlockType(
        256, 110, 16, (Plane(32, 64, 2, 32), Plane(0, 32, 1, 32)), -4, 3, d=108,
        scales=(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4)), lowest_scale=-32, highest_scale=31,
    ),
    "Q4_K": BlockType(
        256, 144, 32, (Plane(16, 128, 4, 32),), 0, 15, d=0, dmin=2,
        minima=True, lowest_scale=0, highest_scale=63,
    ),
    "Q5_K": BlockType(
        256, 176, 32, (Plane(48, 128, 4, 32), Plane(16, 32, 1, 32)), 0, 31, d=0, dmin=2,
        minima=True, lowest_scale=0, highest_scale=63,
    ),
    "Q6_K": BlockType(
        256, 210, 16, (Plane(0, 128, 4, 64), Plane(128, 64, 2, 32)), -32, 31, d=208,
        scales=(Plane(192, 16, 8, 16),), lowest_scale=-128, highest_scale=127,
    ),
}  # fmt: skip
"""The types that can be taken apart and put together, by their names in ggml."""


@dataclass(frozen=True)
class Blocks:
    """The rows of a tensor in one type, taken apart.

    Attributes:
        codes: [N, K] int16. d: [N, K / size] float16, as stored. scales: [N, K / group] int16, ones in legacy types.
        dmin, minima: the same of the minima; None where the type has none.
    """

    kind: str
    codes: Integers
    d: Halves
    scales: Integers
    dmin: Halves | None = None
    minima: Integers | None = None

    def values(self) -> Floats:
        """The weights, [N, K] float32, as llama.cpp computes them."""
        layout = BLOCK_TYPES[self.kind]
        groups = layout.size // layout.group
        step = np.repeat(self.d.astype(np.float32), groups, axis=1) * self.scales.astype(np.float32)
        level = self.codes if layout.codebook is None else np.array(layout.codebook, dtype=np.int16)[self.codes]
        values: Floats = np.repeat(step, layout.group, axis=1) * level.astype(np.float32)
        if self.dmin is None or self.minima is None:
            return values
        offset = np.repeat(self.dmin.astype(np.float32), groups, axis=1) * self.minima.astype(np.float32)
        return values - np.repeat(offset, layout.group, axis=1)


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row.

    Raises:
        ValueError: the row is not made of whole blocks.
    """
    layout = BLOCK_TYPES[kind]
    if columns % layout.size:
        raise ValueError(f"rows of {columns} values are not whole blocks of {layout.size}")
    return columns // layout.size * layout.nbytes


def decode(data: Bytes, kind: str) -> Blocks:
    """Take rows apart.

    Args:
        data: uint8 [N, bytes of a row]. kind: one of :data:`BLOCK_TYPES`.

    Raises:
        ValueError: the rows are not made of whole blocks.
    """
    layout, rows = BLOCK_TYPES[kind], len(data)
    if data.shape[1] % layout.nbytes:
        raise ValueError(f"rows of {data.shape[1]} bytes are not whole blocks of {layout.nbytes}")
    blocks = np.ascontiguousarray(data).reshape(-1, layout.nbytes)
    stored = _joined(layout.codes, blocks)
    codes = stored.astype(np.int8).astype(np.int16) if layout.signed else stored + np.int16(layout.lowest)
    scales, minima = _scales(layout, blocks)
    dmin = None if layout.dmin is None else _halves(blocks, layout.dmin)
    if dmin is not None and layout.added:
        dmin, minima = -dmin, scales
    return Blocks(
        kind,
        codes.reshape(rows, -1),
        _halves(blocks, layout.d).reshape(rows, -1),
        scales.reshape(rows, -1),
        None if dmin is None else dmin.reshape(rows, -1),
        None if minima is None else minima.reshape(rows, -1),
    )


def encode(taken_apart: Blocks) -> Bytes:
    """Put rows together again, uint8 [N, bytes of a row].

    Raises:
        ValueError: a code, scale or minimum is outside the type's range.
    """
    layout, rows = BLOCK_TYPES[taken_apart.kind], len(taken_apart.codes)
    codes = taken_apart.codes.reshape(-1, layout.size)
    # llama.cpp writes -128 nowhere in Q8_0, but a file may hold it
    _check("code", codes, -128 if layout.signed else layout.lowest, layout.highest)
    blocks = np.zeros((len(codes), layout.nbytes), dtype=np.uint8)
    _split(codes if layout.signed else codes - np.int16(layout.lowest), layout.codes, blocks)
    _put_half(blocks, layout.d, taken_apart.d)
    if layout.dmin is not None:
        assert taken_apart.dmin is not None
        _put_half(blocks, layout.dmin, -taken_apart.dmin if layout.added else taken_apart.dmin)
    if layout.has_scales:
        scales = taken_apart.scales.reshape(len(codes), -1)
        _check("scale", scales, layout.lowest_scale, layout.highest_scale)
        minima = None
        if layout.minima:
            assert taken_apart.minima is not None
            minima = taken_apart.minima.reshape(len(codes), -1)
            _check("minimum", minima, layout.lowest_scale, layout.highest_scale)
        _put_scales(layout, blocks, scales, minima)
    return blocks.reshape(rows, -1)


def _check(what: str, numbers: Integers, lowest: int, highest: int) -> None:
    if numbers.size and not lowest <= int(numbers.min()) <= int(numbers.max()) <= highest:
        raise ValueError(f"a {what} is outside {lowest} to {highest}")


def _joined(planes: tuple[Plane, ...], blocks: Bytes) -> Integers:
    whole, shift = planes[0].unpack(blocks), planes[0].bits
    for plane in planes[1:]:
        whole |= plane.unpack(blocks) << np.int16(shift)
        shift += plane.bits
    return whole


def _split(numbers: Integers, planes: tuple[Plane, ...], blocks: Bytes) -> None:
    shift = 0
    for plane in planes:
        plane.pack(numbers >> np.int16(shift), blocks)
        shift += plane.bits


def _scales(layout: BlockType, blocks: Bytes) -> tuple[Integers, Integers | None]:
    """Integer scales and minima of blocks, [B, groups] each."""
    if not layout.has_scales:
        return np.ones((len(blocks), layout.size // layout.group), dtype=np.int16), None
    if not layout.scales:
        return _six_bits(blocks[:, 4 : 4 + PACKED_SCALES].astype(np.int16))
    stored = _joined(layout.scales, blocks)
    if layout.minima:
        half = stored.shape[1] // 2
        return stored[:, :half], stored[:, half:]
    if layout.highest_scale > 31:
        return stored.astype(np.int8).astype(np.int16), None
    return stored + np.int16(layout.lowest_scale), None


def _put_scales(layout: BlockType, blocks: Bytes, scales: Integers, minima: Integers | None) -> None:
    if not layout.scales:
        assert minima is not None
        blocks[:, 4 : 4 + PACKED_SCALES] = _packed_six_bits(scales, minima)
    elif minima is not None:
        _split(np.concatenate([scales, minima], axis=1), layout.scales, blocks)
    else:
        _split(scales if layout.highest_scale > 31 else scales - np.int16(layout.lowest_scale), layout.scales, blocks)


def _six_bits(packed: Integers) -> tuple[Integers, Integers]:
    """Eight scales and eight minima: six bits of the first four in a byte, whose two high bits belong to the others."""
    scales, minima, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        np.concatenate([scales & 63, (low & 15) | ((scales >> 2) & 48)], axis=1),
        np.concatenate([minima & 63, (low >> 4) | ((minima >> 2) & 48)], axis=1),
    )


def _packed_six_bits(scales: Integers, minima: Integers) -> Bytes:
    first = [numbers[:, :4] | ((numbers[:, 4:] >> 4) << 6) for numbers in (scales, minima)]
    low = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    packed: Bytes = np.concatenate([*first, low], axis=1).astype(np.uint8)
    return packed


def _halves(blocks: Bytes, start: int) -> Halves:
    halves: Halves = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")
    return halves


def _put_half(blocks: Bytes, start: int, values: Halves) -> None:
    blocks[:, start : start + 2] = np.ascontiguousarray(values.reshape(-1, 1).astype("<f2")).view(np.uint8)
