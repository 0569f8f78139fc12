"""Hidden states of all windows: in memory, in files if memory is short, or in both so that a build can be resumed.

Plain reads and writes instead of a memory map, because the pages of a shared map count as memory of the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class StateFiles:
    """The files of a stream's states: two, written alternately, so that one is always complete.

    Attributes:
        spilled: the states are only in the files; otherwise also in memory, and the files serve to resume a build.
    """

    folder: Path
    name: str
    spilled: bool = False

    def file(self, block: int) -> Path:
        """The file of the input states of ``block``."""
        return self.folder / f"{self.name}.{block % 2}"


class States:
    """Hidden states, [samples, length, width], carried from block to block.

    A double buffer: writes become readable after :meth:`turn`. States in memory are overwritten in place, so each
    window must be read for the last time before it is written.

    Args:
        shape, dtype: of the states. place: the states' files; None holds them in memory only.
        block: resume with the input states of this block from ``place``; None starts empty.
        digest: the expected SHA-256 of these states.

    Attributes:
        digest: SHA-256 of the states as written to disk; None if they were not written.

    Raises:
        OSError: the files cannot be written or read, or do not match ``digest``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        place: StateFiles | None = None,
        block: int | None = None,
        digest: str | None = None,
    ) -> None:
        self.shape, self.dtype, self.place = shape, dtype, place
        self.block = -1 if block is None else block
        self.digest = digest
        self._held = None if place and place.spilled else torch.empty(shape, dtype=dtype)
        self._hash, self._hashed = hashlib.sha256(), 0
        if place and block is not None:
            path = place.file(block)
            if path.stat().st_size < shape[0] * self._window_bytes:
                raise OSError(0, "it is truncated", str(path))
            if self._held is not None:
                _read(path, 0, self._held)
            if digest is not None and digest != self._digest_of_file(path):
                raise OSError(0, "its content differs from what was written", str(path))

    @property
    def whole(self) -> torch.Tensor:
        """All states; only available if they are in memory."""
        assert self._held is not None, "spilled states are never whole in memory"
        return self._held

    @whole.setter
    def whole(self, states: torch.Tensor) -> None:
        self._held = states

    def read(self, windows: slice) -> torch.Tensor:
        """The states of ``windows``; a view if they are in memory."""
        if self._held is not None:
            return self._held[windows]
        assert self.place
        first, last, _ = windows.indices(self.shape[0])
        states = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
        _read(self.place.file(self.block), first * self._window_bytes, states)
        return states

    def write(self, windows: slice, states: torch.Tensor) -> None:
        """Store a block's output for ``windows``."""
        if self._held is not None:
            self._held[windows] = states
            return
        assert self.place
        offset, states = windows.indices(self.shape[0])[0] * self._window_bytes, states.to("cpu", self.dtype)
        if offset == self._hashed:  # in order so far, so the file need not be re-read for its hash
            self._hash.update(_bytes(states))
            self._hashed += states.numel() * states.itemsize
        with _opened(self.place.file(self.block + 1), os.O_WRONLY | os.O_CREAT) as file:
            _write(file, offset, states)

    def turn(self, flush: bool = True) -> None:
        """Make the written windows, all of them, readable; with ``flush`` also write them to disk and sync."""
        self.block += 1
        self.digest = None
        if self.place and flush:
            path = self.place.file(self.block)
            with _opened(path, os.O_WRONLY | os.O_CREAT) as file, ThreadPoolExecutor(1, "hash") as pool:
                if self._held is not None:
                    hashing = pool.submit(_sha256, self._held)
                    _write(file, 0, self._held)
                os.fsync(file)
                if self._held is not None:
                    self.digest = hashing.result()
                elif self._hashed == self.shape[0] * self._window_bytes:
                    self.digest = self._hash.hexdigest()
                else:
                    self.digest = self._digest_of_file(path)
        self._hash, self._hashed = hashlib.sha256(), 0

    def copy(self, name: str) -> States:
        """An independent copy, whose files have another ``name``."""
        place = replace(self.place, name=name) if self.place else None
        other = States(self.shape, self.dtype, place)
        other.block = self.block - 1
        for first in range(self.shape[0]):
            window = slice(first, first + 1)
            other.write(window, self.read(window))
        other.turn()
        return other

    def _digest_of_file(self, path: Path) -> str:
        """SHA-256 of the states in a file, taken from memory if they were read from it."""
        if self._held is not None:
            return _sha256(self._held)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _window_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape[1:]:
            size *= length
        return size


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags, 0o644)
    try:
        yield file
    finally:
        os.close(file)


def _bytes(states: torch.Tensor) -> memoryview:
    view: memoryview = states.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def _sha256(states: torch.Tensor) -> str:
    return hashlib.sha256(_bytes(states)).hexdigest()


def _write(file: int, offset: int, states: torch.Tensor) -> None:
    view = _bytes(states)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read(path: Path, offset: int, states: torch.Tensor) -> None:
    view = _bytes(states)
    with _opened(path, os.O_RDONLY) as file:
        while view:
            count = os.preadv(file, [view], offset)
            if not count:
                raise OSError(0, "it is truncated", str(path))
            view, offset = view[count:], offset + count
