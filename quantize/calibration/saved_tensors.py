"""Save tensors atomically to a file of the cache, with the digest of each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from quantize.files.cache import as_os_error
from quantize.formats.safetensors_digests import digest_of
from quantize.formats.tensor_file import DIGESTS, NAMES, tensor_bytes
from quantize.formats.tensors import TensorSpec


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically: under a temporary name, flushed, renamed.

    It includes the digest of every tensor, for :meth:`quantize.formats.tensor_file.TensorFile.guarded`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {
        name: digest_of(TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape)), tensor_bytes(tensor))
        for name, tensor in plain.items()
    }
    try:
        try:
            save_file(plain, temporary, {DIGESTS: json.dumps(digests)})
        except SafetensorError as error:  # for example, a full disk
            raise as_os_error(error, path) or error from None
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
