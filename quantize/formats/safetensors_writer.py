"""Write safetensors files tensor by tensor, in any order, at offsets fixed beforehand.

The layout is known before the first tensor exists, so the header is written first, and each tensor at its
offset as soon as it is ready: nothing is buffered in memory, and no shard is written twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from quantize.formats.safetensors_digests import CHUNK, begin_checksum, checksum_of
from quantize.formats.safetensors_header import header_of
from quantize.formats.tensor_file import DTYPES
from quantize.formats.tensors import INDEX_NAME, TensorSpec


class ShardWriter:
    """Writes the tensors of a layout into the shards of a folder.

    Args:
        folder: an existing folder; the files must not exist yet.
        shards: the tensors of each file, by file name.
        written: resume existing files that already contain these tensors: their checksums by name.

    Raises:
        OSError: the files exist, or, with ``written``, are missing.
        ValueError: the files have another layout, or a tensor differs from its checksum.
    """

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, Mapping[str, TensorSpec]],
        written: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.shards, self._new = folder, shards, written is None
        self._files: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, TensorSpec]] = {}
        self._checksums = dict(written or {})
        self._new_checksums: dict[str, str] = {}

    def __enter__(self) -> ShardWriter:
        for name, tensors in self.shards.items():
            header, offsets = header_of(tensors)
            file = os.open(self.folder / name, os.O_RDWR | (os.O_CREAT | os.O_EXCL if self._new else 0), 0o644)
            self._files[name] = file
            if self._new:
                _write_all(file, header, 0)
            elif os.pread(file, len(header), 0) != header:
                raise ValueError(f"{name} has another layout")
            for key, offset in offsets.items():
                self._places[key] = (name, len(header) + offset, tensors[key])
        self._check_written()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its offset.

        Raises:
            KeyError: it is not in the layout. ValueError: its dtype or shape differs from the layout's.
        """
        shard, offset, spec = self._places[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} where the layout has {spec}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        _write_all(self._files[shard], data.data, offset)
        self._checksums[name] = self._new_checksums[name] = checksum_of(spec, data.data)

    @property
    def checksums(self) -> Mapping[str, str]:
        """CRC-32 of the tensors written so far, by name; see :func:`checksum_of`."""
        return self._checksums

    def take_new_checksums(self) -> dict[str, str]:
        """Checksums of the tensors written since the last call."""
        new, self._new_checksums = self._new_checksums, {}
        return new

    def sync(self) -> None:
        """Flush the files to disk."""
        for handle in self._files.values():
            os.fsync(handle)

    def finish(self) -> None:
        """Check that every tensor was written, flush to disk, and write the index if there are several shards.

        Raises:
            ValueError: a tensor is missing.
        """
        if missing := self._places.keys() - self._checksums.keys():
            raise ValueError(f"{len(missing)} tensors were never written, such as {min(missing)}")
        self.sync()
        if len(self.shards) > 1:
            total = sum(spec.nbytes for tensors in self.shards.values() for spec in tensors.values())
            table = {key: name for name, tensors in self.shards.items() for key in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
            with (self.folder / INDEX_NAME).open("w", encoding="utf-8") as file:
                file.write(json.dumps(index, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _check_written(self) -> None:
        """Check the checksum of every tensor that an interrupted build wrote."""
        if odd := self._checksums.keys() - self._places.keys():
            raise ValueError(f"{min(odd)} belongs to another layout")
        for name in sorted(self._checksums, key=lambda name: self._places[name][:2]):
            shard, offset, spec = self._places[name]
            if _checksum_at(self._files[shard], offset, spec) != self._checksums[name]:
                raise ValueError(f"{name} in {shard} differs from its recorded checksum")


def _checksum_at(file: int, offset: int, spec: TensorSpec) -> str:
    checksum, end = begin_checksum(spec), offset + spec.nbytes
    while chunk := os.pread(file, min(CHUNK, end - offset), offset):
        checksum.update(chunk)
        offset += len(chunk)
    return checksum.hexdigest()


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
