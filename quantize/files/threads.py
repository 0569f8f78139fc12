"""How many threads this process may use. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def thread_count() -> int:
    """Threads of arithmetic, here and in child processes: what OMP_NUM_THREADS says, else the processors at hand."""
    said = os.environ.get(VARIABLE, "").split(",")[0].strip()  # a list gives the number for each level of nesting
    return int(said) if said.isdecimal() and int(said) else processors()


def processors() -> int:
    """Processors that this process may run on, by its affinity and by the quota of its container; at least one."""
    counted = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    if hasattr(os, "sched_getaffinity"):
        counted = min(counted, len(os.sched_getaffinity(0)))
    return max(1, min([counted, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """Processors' worth of time that each control group around this process allows; none where nothing is limited."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # not Linux
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if not controllers:
            root, read = CGROUPS, _second_version
        elif "cpu" in controllers.split(","):
            root = next((CGROUPS / name for name in (controllers, "cpu") if (CGROUPS / name).is_dir()), CGROUPS / "cpu")
            read = _first_version
        else:
            continue
        inner = root / place.lstrip("/")
        # a container may see the host's path, but its own group mounted as the root
        for folder in [inner, *inner.parents]:
            if folder.is_relative_to(root) and (quota := read(folder)):
                found.append(quota)
    return found


def _second_version(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _first_version(folder: Path) -> float | None:
    try:
        quota, period = (
            int((folder / name).read_text(encoding="ascii")) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
