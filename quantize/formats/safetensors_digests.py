"""SHA-256 of a safetensors file with a digest or a checksum of each of its tensors, in one reading. Imports no torch.

The source's tensors are held against SHA-256, since others write them. What this process wrote is held against CRC-32,
which finds what a disk does and takes a third of the time; the finished file has its SHA-256 all the same.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from quantize.formats.safetensors_header import Header, file_header
from quantize.formats.tensors import TensorSpec

CHUNK = 4 << 20


class Hash(Protocol):
    """What the hashes of hashlib and :class:`Checksum` share."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far, in hexadecimal."""


class Checksum:
    """CRC-32 with the interface of hashlib."""

    def __init__(self, data: bytes) -> None:
        self._value = zlib.crc32(data)

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of a safetensors file, and the digest or checksum of each tensor by name."""

    sha256: str
    tensors: Mapping[str, str]

    def mismatch(self, known: Mapping[str, str]) -> str | None:
        """The name of a tensor that differs from ``known`` or is missing; None if all of them match."""
        return next((name for name, value in known.items() if self.tensors.get(name) != value), None)


def begin_digest(spec: TensorSpec) -> Hash:
    """Start the SHA-256 of a tensor with its dtype and shape, since equal bytes can be different tensors."""
    return hashlib.sha256(_prefix(spec))


def begin_checksum(spec: TensorSpec) -> Hash:
    """Start the CRC-32 of a tensor with its dtype and shape."""
    return Checksum(_prefix(spec))


def digest_of(spec: TensorSpec, data: memoryview) -> str:
    """SHA-256 of a tensor, in hexadecimal.

    Args:
        data: its bytes as stored.
    """
    return _finish(begin_digest(spec), data)


def checksum_of(spec: TensorSpec, data: memoryview) -> str:
    """CRC-32 of a tensor, in hexadecimal.

    Args:
        data: its bytes as stored.
    """
    return _finish(begin_checksum(spec), data)


def fingerprint(path: Path, begin: Callable[[TensorSpec], Hash] = begin_digest) -> Fingerprint:
    """Read a file once, and hash the file and its tensors.

    Args:
        begin: starts the hash of a tensor: :func:`begin_digest` or :func:`begin_checksum`.

    Raises:
        OSError: it cannot be read. ValueError: it is not a safetensors file, or is truncated.
    """
    header = file_header(path)
    tensors = _Tensors(header, begin)
    whole = hashlib.sha256()
    pending: Future[None] | None = None
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as pool:
        for chunk in _chunks(file):
            waiting, pending = pending, pool.submit(whole.update, chunk)
            tensors.update(chunk)
            if waiting:
                waiting.result()
        if pending:
            pending.result()
    return Fingerprint(whole.hexdigest(), tensors.finish())


def _prefix(spec: TensorSpec) -> bytes:
    return f"{spec.dtype}{list(spec.shape)}\0".encode()


def _finish(found: Hash, data: memoryview) -> str:
    found.update(data)
    return found.hexdigest()


def _chunks(file: BinaryIO) -> Iterator[memoryview]:
    """The file's bytes. A chunk is valid until the second one after it is requested."""
    buffers, turn = [bytearray(CHUNK) for _ in range(2)], 0
    while count := file.readinto(buffers[turn]):  # type: ignore[attr-defined]
        yield memoryview(buffers[turn])[:count]
        turn = 1 - turn


class _Tensors:
    """Hashes tensors from the bytes of their file, received in chunks."""

    def __init__(self, header: Header, begin: Callable[[TensorSpec], Hash]) -> None:
        self._header, self._begin = header, begin
        self._names = sorted(header.places, key=lambda name: header.places[name])
        self._next, self._position = 0, 0
        self._digest: Hash | None = None
        self._found: dict[str, str] = {}

    def update(self, chunk: memoryview) -> None:
        start, end = self._position, self._position + len(chunk)
        while self._next < len(self._names):
            name = self._names[self._next]
            first, last = self._header.places[name]
            if first > end:
                break
            if self._digest is None:
                self._digest = self._begin(self._header.tensors[name])
            self._digest.update(chunk[max(first, start) - start : max(0, min(last, end) - start)])
            if last > end:
                break
            self._found[name] = self._digest.hexdigest()
            self._digest, self._next = None, self._next + 1
        self._position = end

    def finish(self) -> dict[str, str]:
        if self._next < len(self._names):
            raise ValueError("it is truncated")
        return self._found
