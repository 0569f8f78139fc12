"""Tensors read out of a safetensors file by plain reads.

The library maps whole files into memory, privately: a shard then counts against a limit on the process
(``ulimit``, a container's accounting) though one tensor is wanted. A read takes the tensor's bytes and no more.
Format: https://github.com/huggingface/safetensors (8 bytes length, a JSON header, the data).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quantize.files.cache import as_os_error
from quantize.formats.safetensors_header import file_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file whole, or not at all: under a temporary name, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # a full disk, say
            raise as_os_error(error, path) or error from None
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class TensorFile:
    """One safetensors file; its header is read once.

    Raises:
        OSError, ValueError: not there, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._header = path, file_header(path)

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored.

        Raises:
            OSError: the file cannot be read. KeyError: no such tensor, or a dtype unknown here.
            ValueError: the file is shorter than its header says.
        """
        spec, (first, last) = self._header.tensors[name], self._header.places[name]
        dtype, shape = DTYPES[spec.dtype], spec.shape
        tensor = torch.empty(shape, dtype=dtype)
        view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data if math.prod(shape) else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek(first)
            if len(view) != last - first:
                raise ValueError("its header is damaged")
            while view:
                count = file.readinto(view)
                if not count:
                    raise ValueError("it ends too early")
                view = view[count:]
        return tensor
