"""The header of a safetensors file, laid out before any tensor exists. Knows no torch.

Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantize.formats.tensors import DTYPE_BYTES, TensorSpec


def write_hollow(path: Path, tensors: Mapping[str, TensorSpec]) -> None:
    """A file with the header of ``tensors`` and a hole in place of their data, which takes no room on the disk."""
    header, offsets = header_of(tensors)
    end = max((offset + tensors[name].nbytes for name, offset in offsets.items()), default=0)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(len(header) + end)


def header_of(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Header bytes and data offsets: wide dtypes first, so that every tensor is aligned, then by name."""
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
