"""The header of a safetensors file: parsed from bytes, or laid out before any tensor exists. Imports no torch.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.formats.tensors import DTYPE_BYTES, TensorSpec

MOST_HEADER = 100_000_000
"""Bytes; the library refuses longer headers too."""
MOST_DIMENSIONS = 64
MOST_NAME, MOST_DTYPE = 500, 16
"""Characters of a tensor's name, and of its dtype's."""


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: dtype and shape of each tensor by name.
        places: first (inclusive) and last (exclusive) byte of each tensor in the file.
        start: first byte after the header.
        metadata: the file's ``__metadata__``.
    """

    tensors: Mapping[str, TensorSpec]
    places: Mapping[str, tuple[int, int]]
    start: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The length in bytes that the file must have."""
        return max((end for _, end in self.places.values()), default=self.start)


def read_header(read: Callable[[int, int], bytes], file: str = "") -> Header:
    """Parse and check the header of a safetensors file.

    Args:
        read: returns the bytes from a first (inclusive) to a last (exclusive) position; fewer at the end of the file.
        file: file name for the specs.

    Raises:
        ValueError: it is not a safetensors file, or damaged.
    """
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= MOST_HEADER:
        raise ValueError("it is not a safetensors file")
    text = read(8, 8 + length)
    if len(text) < length:
        raise ValueError("it is truncated")
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        metadata = table.pop("__metadata__", None)
        specs = {name: TensorSpec(entry["dtype"], tuple(entry["shape"]), file) for name, entry in table.items()}
        places = {name: tuple(entry["data_offsets"]) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its header is damaged") from None
    _check_places(specs, places)
    start = 8 + length
    places = {name: (start + first, start + last) for name, (first, last) in places.items()}
    return Header(specs, places, start, metadata if isinstance(metadata, dict) else {})


def file_header(path: Path) -> Header:
    """The header of a file on disk.

    Raises:
        OSError: it cannot be read. ValueError: see :func:`read_header`.
    """
    with path.open("rb") as file:

        def read(first: int, last: int) -> bytes:
            file.seek(first)
            return file.read(last - first)

        return read_header(read, path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _check_places(specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[Any, ...]]) -> None:
    """Check that offsets are integers, contiguous without gap or overlap, and match dtype and shape."""
    for name, spec in specs.items():
        if (
            not (name.isprintable() and isinstance(spec.dtype, str))
            or len(name) > MOST_NAME
            or len(spec.dtype) > MOST_DTYPE
            or len(spec.shape) > MOST_DIMENSIONS
            or not all(map(_is_count, (*spec.shape, *places[name])))
        ):
            raise ValueError("its header is damaged")
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        spec = specs[name]
        if len(place) != 2 or place[0] != end or place[1] < end:
            raise ValueError(f"the bytes of its tensor {name[:100]} overlap others, or leave a gap")
        if spec.dtype in DTYPE_BYTES and spec.nbytes != place[1] - end:
            raise ValueError(f"the length of its tensor {name[:100]} does not match its shape")
        end = place[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def write_hollow(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """Write a sparse file: the header of ``tensors``, and a hole for their data that takes no disk space."""
    header, offsets = header_of(tensors)
    end = max((offset + tensors[name].nbytes for name, offset in offsets.items()), default=0)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(len(header) + end)


def header_of(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header's bytes and each tensor's data offset: wide dtypes first, so tensors are aligned, then by name."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda key: (-DTYPE_BYTES[tensors[key].dtype], key)):
        spec = tensors[name]
        offsets[name] = end
        table[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
