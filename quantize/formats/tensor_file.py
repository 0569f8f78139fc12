"""Read single tensors of a safetensors file with plain reads.

The safetensors library maps whole files into memory, so that a whole shard counts against the limits of the process
(``ulimit``, a container's accounting) even if one tensor is needed. A plain read takes that tensor's bytes only.
Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from quantize.formats.safetensors_digests import digest_of
from quantize.formats.safetensors_header import file_header

DTYPES = {
    "F8_E8M0": torch.uint8,  # exponents of 2; not every torch has a dtype for them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


NAMES = {dtype: name for name, dtype in DTYPES.items()}
DIGESTS = "digests"
"""Metadata key for the digests of a file's tensors, as JSON."""


class NotAsWritten(ValueError):
    """A tensor's bytes differ from its digest."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} changed after it was hashed")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as bytes."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    return data


class TensorFile:
    """One safetensors file; its header is read once.

    Args:
        digests: digest of each tensor to check at every read; None reads without checks.

    Raises:
        OSError, ValueError: it cannot be read, or is not a safetensors file.
    """

    def __init__(self, path: Path, digests: Mapping[str, str] | None = None) -> None:
        self.path, self._header, self._digests = path, file_header(path), digests

    @classmethod
    def guarded(cls, path: Path) -> TensorFile:
        """Open a file that contains digests, against which reads are checked.

        Raises:
            OSError, ValueError: it cannot be read, is not a safetensors file, or has no digests.
        """
        file = cls(path)
        try:
            file._digests = dict(json.loads(file._header.metadata[DIGESTS]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError("it contains no digests") from None
        return file

    @property
    def names(self) -> list[str]:
        """Names of all its tensors."""
        return list(self._header.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored.

        Raises:
            OSError: the file cannot be read. KeyError: the tensor does not exist, or its dtype is unknown.
            ValueError: the file is truncated.
            NotAsWritten: the tensor differs from its digest.
        """
        spec, (first, last) = self._header.tensors[name], self._header.places[name]
        dtype, shape = DTYPES[spec.dtype], spec.shape
        tensor = torch.empty(shape, dtype=dtype)
        data = view = tensor_bytes(tensor)
        with self.path.open("rb", buffering=0) as file:
            file.seek(first)
            if len(view) != last - first:
                raise ValueError("its header is damaged")
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError("it is truncated")
                view = view[count:]
        if self._digests is not None and digest_of(spec, data) != self._digests.get(name):
            raise NotAsWritten(name)
        return tensor
