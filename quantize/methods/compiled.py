"""Access to the compiled kernels: they use torch's number of threads and leave that number unchanged."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch


@contextlib.contextmanager
def compiled(module: str = "kernel") -> Iterator[Any]:
    """Yield :mod:`quantize.methods.kernel`, or another module of kernels, compiled on first use, with numba limited to
    torch's number of threads."""
    threads = torch.get_num_threads()
    numba = _started(threads)
    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield import_module(f"quantize.methods.{module}")
    finally:
        numba.set_num_threads(before)


@functools.cache
def _started(threads: int) -> Any:
    """Start numba's thread pool, which sets OpenMP's number of threads (also torch's) to all CPUs; return numba."""
    numba: Any = import_module("numba")
    numba.get_num_threads()
    torch.set_num_threads(threads)
    return numba
