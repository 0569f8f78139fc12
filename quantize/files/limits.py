"""Limits on this process's memory, as ``ulimit`` and job schedulers set them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryLimit:
    """A limit.

    Attributes:
        nbytes: that the process may have. option: of ``ulimit``, which shows and sets it.
        used: bytes that count against it now; None where the system does not tell.
    """

    nbytes: int
    option: str
    used: int | None

    def __str__(self) -> str:
        return f"the limit of {self.nbytes / 1e9:.2f} GB (ulimit -{self.option})"


def memory_limits() -> list[MemoryLimit]:
    """The limits that are set; none on a system without them."""
    try:
        import resource
    except ImportError:
        return []
    found, used = [], _used()
    for kind, option, counted in ((resource.RLIMIT_AS, "v", "VmSize"), (resource.RLIMIT_DATA, "d", "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            found.append(MemoryLimit(limit, option, used.get(counted)))
    return found


def _used() -> dict[str, int]:
    """Sizes of this process in bytes, by the names of ``/proc/self/status``."""
    with (
        contextlib.suppress(OSError, ValueError),
        open("/proc/self/status", encoding="ascii", errors="replace") as file,
    ):
        rows = (line.split() for line in file if line.startswith("Vm"))
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}
    return {}
