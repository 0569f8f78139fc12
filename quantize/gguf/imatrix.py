"""The importance matrix in llama.cpp's format: sums of squares of each input channel, and token counts.

Format: GGUF of ``general.type`` ``imatrix``, as written by llama-imatrix: for each weight the tensors
``<name>.in_sum2`` float32 [M, K] and ``<name>.counts`` float32 [M, 1], where M is the number of experts stacked in the
weight, or 1. The sums are the diagonal of H = X^T X.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantize.errors import GgufError
from quantize.formats.gguf_reader import open_gguf


@dataclass(frozen=True)
class Importance:
    """Sums of squares and counts by GGUF tensor name.

    Attributes:
        sums: float32 [M, K] each. counts: tokens, int64 [M].
        dataset: name of the text. chunks, chunk_size: number of windows, and tokens in each.
    """

    sums: Mapping[str, NDArray[np.float32]]
    counts: Mapping[str, NDArray[np.int64]]
    dataset: str
    chunks: int
    chunk_size: int

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Mean squares for the quantizer, float32 [M * K]. A matrix that no token reached gets ones."""
        found: dict[str, NDArray[np.float32]] = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None].astype(np.float32)
            found[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).reshape(-1)
        return found


def write_importance(path: Path, importance: Importance) -> None:
    """Write the file atomically."""
    import gguf

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, "")
    try:
        writer.kv_data[0].clear()  # no architecture key, as it is not a model
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [importance.dataset])
        writer.add_uint32("imatrix.chunk_count", importance.chunks)
        writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
        for name in sorted(importance.sums):
            writer.add_tensor(f"{name}.in_sum2", importance.sums[name].astype(np.float32))
            writer.add_tensor(f"{name}.counts", importance.counts[name].astype(np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_importance(path: Path) -> Importance:
    """Read a file of llama-imatrix or of :func:`write_importance`.

    Raises:
        GgufError: it is not an importance matrix.
    """
    try:
        return _read(path)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise GgufError(f"{path}: is not a GGUF importance matrix: {error}; make one with llama-imatrix") from None


def _read(path: Path) -> Importance:
    reader = open_gguf(path)
    sums: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        if what in {"in_sum2", "counts"} and tensor.tensor_type.name != "F32":
            raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, not F32")
        if what == "in_sum2":
            sums[name] = np.array(tensor.data, dtype=np.float32).reshape(-1, int(tensor.shape[0]))
        elif what == "counts":
            found = np.array(tensor.data).reshape(-1)
            if not np.isfinite(found).all():
                raise ValueError(f"{tensor.name} contains a count that is not a finite number")
            counts[name] = found.astype(np.int64)
    if not sums or {name: len(rows) for name, rows in sums.items()} != {name: len(c) for name, c in counts.items()}:
        raise GgufError(
            f"{path}: is not a GGUF importance matrix (tensors .in_sum2 and .counts); make one with llama-imatrix"
        )
    bad = [name for name, values in sums.items() if (counts[name] < 0).any() or not np.isfinite(values).all()]
    if bad:
        raise GgufError(
            f"{path}: {bad[0]} contains NaN, infinity or a negative count; make the importance matrix again"
        )

    def number(key: str) -> int:
        field = reader.fields.get(key)
        return int(field.contents()) if field else 0

    datasets = reader.fields.get("imatrix.datasets")
    named = list(datasets.contents()) if datasets else []
    return Importance(
        sums, counts, str(named[0]) if named else "", number("imatrix.chunk_count"), number("imatrix.chunk_size")
    )
