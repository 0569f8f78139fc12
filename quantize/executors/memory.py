"""Memory that was freed, given back to the system, and to the GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

MMAP_THRESHOLD = 8 << 20  # bytes; a tensor this large is a mapping of its own
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.malloc_trim and libc.mallopt else None
    except (OSError, AttributeError, TypeError):
        return None  # not glibc: its allocator has no such calls


def return_large_buffers() -> None:
    """Have every large buffer go back to the system as soon as it is freed.

    glibc raises its threshold to the largest buffer ever freed, up to 32 MB; the buffers of a block then lie on the
    heap between small objects that stay, and the peak would grow with the number of blocks. A threshold that the
    user set in the environment stays.
    """
    libc = _libc()
    if libc and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def give_back() -> None:
    """Return freed heap pages to the system, and freed buffers of a GPU to all sizes of tensors."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if libc := _libc():
        libc.malloc_trim(0)
