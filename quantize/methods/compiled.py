"""The way to the compiled kernels: they run on as many threads as torch, and leave torch's number as it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch


@contextlib.contextmanager
def compiled() -> Iterator[Any]:
    """:mod:`quantize.methods.kernel`, which compiles on its first use; inside, numba has as many threads as torch."""
    threads = torch.get_num_threads()
    numba = _started(threads)
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield import_module("quantize.methods.kernel")
    finally:
        numba.set_num_threads(before)


@functools.cache
def _started(threads: int) -> Any:
    """numba, whose threads are started. That sets OpenMP's number, which is torch's too, to all processors."""
    numba: Any = import_module("numba")
    numba.get_num_threads()
    torch.set_num_threads(threads)
    return numba
