"""SHA-256 of a safetensors file and of each of its tensors, in one reading. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantize.formats.safetensors_header import Header, file_header
from quantize.formats.tensors import TensorSpec

CHUNK = 4 << 20


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 of a safetensors file, and of each tensor by name (:func:`begin_digest`)."""

    sha256: str
    tensors: Mapping[str, str]

    def mismatch(self, digests: Mapping[str, str]) -> str | None:
        """The name of a tensor that differs from ``digests`` or is missing; None if all of them match."""
        return next((name for name, digest in digests.items() if self.tensors.get(name) != digest), None)


def begin_digest(spec: TensorSpec) -> Any:
    """Start the hash of a tensor with its dtype and shape, since equal bytes can be different tensors."""
    return hashlib.sha256(f"{spec.dtype}{list(spec.shape)}\0".encode())


def digest_of(spec: TensorSpec, data: memoryview) -> str:
    """SHA-256 of a tensor, in hexadecimal.

    Args:
        data: its bytes as stored.
    """
    digest = begin_digest(spec)
    digest.update(data)
    return str(digest.hexdigest())


def fingerprint(path: Path) -> Fingerprint:
    """Read a file once, and hash the file and its tensors.

    Raises:
        OSError: it cannot be read. ValueError: it is not a safetensors file, or is truncated.
    """
    header = file_header(path)
    tensors = _Tensors(header)
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


def _chunks(file: BinaryIO) -> Iterator[memoryview]:
    """The file's bytes. A chunk is valid until the second one after it is requested."""
    buffers, turn = [bytearray(CHUNK) for _ in range(2)], 0
    while count := file.readinto(buffers[turn]):  # type: ignore[attr-defined]
        yield memoryview(buffers[turn])[:count]
        turn = 1 - turn


class _Tensors:
    """Hashes tensors from the bytes of their file, received in chunks."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._names = sorted(header.places, key=lambda name: header.places[name])
        self._next, self._position = 0, 0
        self._digest: Any = None
        self._found: dict[str, str] = {}

    def update(self, chunk: memoryview) -> None:
        start, end = self._position, self._position + len(chunk)
        while self._next < len(self._names):
            name = self._names[self._next]
            first, last = self._header.places[name]
            if first > end:
                break
            if self._digest is None:
                self._digest = begin_digest(self._header.tensors[name])
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
