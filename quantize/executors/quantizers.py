"""Who runs llama.cpp's quantizer: child processes of this machine, or of others that see the same files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from quantize.files.child import Child
from quantize.files.threads import thread_count
from quantize.gguf.quantize import finish, start

LEVEL_MEMORY = 512 * 2**20  # of one running quantizer


class Quantizers(Protocol):
    """Runs requests for levels, several at a time."""

    def lanes(self, count: int) -> tuple[int, int]:
        """How many of ``count`` requests to run side by side, and the threads of each."""

    def run(self, request: Mapping[str, Any], on_line: Callable[[str], None]) -> tuple[int, str]:
        """Run one request to its end.

        Args:
            request: from :func:`quantize.gguf.quantize.request`. on_line: hears every line of llama.cpp's log.

        Returns:
            The exit code, negative where a signal ended it, and the end of the log.
        """

    def stop(self) -> None:
        """End all that run."""


class LocalQuantizers:
    """Child processes of this one, within its cores, its memory and ``budget`` bytes of it; None sets no limit."""

    def __init__(self, budget: int | None = None) -> None:
        self._budget = budget
        self._running: set[Child] = set()
        self._lock = threading.Lock()

    def lanes(self, count: int) -> tuple[int, int]:
        cores = thread_count()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 2**34
        memory = min(memory, self._budget or memory)
        lanes = max(1, min(cores, count, memory // LEVEL_MEMORY))
        return lanes, max(1, cores // lanes)

    def run(self, request: Mapping[str, Any], on_line: Callable[[str], None]) -> tuple[int, str]:
        with self._lock:
            child = start(request)
            self._running.add(child)
        try:
            with child:
                return finish(child, on_line)
        finally:
            with self._lock:
                self._running.discard(child)

    def stop(self) -> None:
        with self._lock:
            for child in self._running:
                child.kill()
