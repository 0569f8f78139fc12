"""Read the next block's tensors in the background while the present block is in use.

For a GPU they are copied from pinned host memory on a separate stream, which the computing stream waits for when they
are taken. On a CPU reading is two or three per cent of a build (docs/benchmarks.md) and prefetching would take memory
and cores from it, so it is used for GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event

import torch

Tensors = dict[str, torch.Tensor]


class Prefetch:
    """Reads the tensors of one block ahead; at most one block is pending.

    Args:
        read: returns a tensor in host memory by name; called in a separate thread.
        device: the tensors' target device.
    """

    def __init__(self, read: Callable[[str], torch.Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._stop = Event()
        self._key: int | None = None
        self._coming: Future[tuple[Tensors, torch.cuda.Event | None]] | None = None

    def start(self, key: int, names: Sequence[str]) -> None:
        """Start reading ``names`` for block ``key``; cancels a pending read."""
        self.drop()
        self._stop = Event()
        self._key = key
        self._coming = self._pool.submit(self._fetch, tuple(names), self._stop)

    def take(self, key: int) -> Mapping[str, torch.Tensor]:
        """Wait for the tensors of block ``key`` and return them by name; none if no read of this block is pending.

        Raises:
            SourceError: raised by ``read``.
        """
        if self._coming is None or self._key != key:
            self.drop()
            return {}
        coming, self._coming = self._coming, None
        tensors, crossed = coming.result()
        if crossed is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(crossed)
            for tensor in tensors.values():
                tensor.record_stream(computing)  # its memory is not reused before the computation is done with it
        return tensors

    def drop(self) -> None:
        """Cancel the pending read after the current tensor; discard its errors."""
        self._stop.set()
        if self._coming is not None:
            self._coming.cancel()
        self._coming = None

    def _fetch(self, names: Sequence[str], stop: Event) -> tuple[Tensors, torch.cuda.Event | None]:
        tensors: Tensors = {}
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for name in names:
                if stop.is_set():
                    return {}, None
                tensor = self._read(name)
                if self._stream is not None:
                    tensor = tensor.pin_memory().to(self._device, non_blocking=True)
                tensors[name] = tensor
            return tensors, self._stream.record_event() if self._stream is not None else None
