"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # not glibc: its allocator has no such call


def give_back() -> None:
    """Return freed heap pages to the system.

    Buffers of a block lie between small objects that stay; glibc keeps the holes, and the peak would grow with the
    number of blocks.
    """
    if trim := _malloc_trim():
        trim(0)
