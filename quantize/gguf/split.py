"""Split a GGUF file in the layout of llama.cpp's gguf-split: ``NAME-00001-of-00003.gguf``, metadata first."""

from __future__ import annotations

import os
from pathlib import Path

TAKEN = frozenset({"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"})


def split_file(path: Path, stem: str, most: int) -> list[Path]:
    """Write the parts of ``path`` beside it, each with at most ``most`` bytes of tensors or one larger tensor.

    Args:
        stem: the parts' name before their number.

    Returns:
        The parts in order, flushed to disk.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path.with_name(f"{stem}.gguf"), architecture, split_max_size=most)
    for key, field in reader.fields.items():
        if key in TAKEN:
            continue
        kind, inner = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{stem}-*-of-*.gguf"))
    for part in parts:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    return parts
