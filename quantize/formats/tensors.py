"""A tensor's description in safetensors terms, and the files' names. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data: safetensors dtype name (``F16``), shape, and the name of its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
