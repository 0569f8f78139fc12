"""``python -m tests.limited SMALL RECIPE DIST HEADROOM WEIGHTS``: RECIPE built under a limit on memory.

The recipe SMALL, of a small model of the same architecture, is built first, which loads every library; beyond what
these take, the process may then allocate HEADROOM bytes and no more. Prints as JSON what it measured. Linux only:
RLIMIT_DATA counts all private writable memory, mapped files too. Run it with MALLOC_MMAP_THRESHOLD_ set: memory that
was freed then goes back to the system at once, so that the limit meets what is in use.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

import quantize


def allocated() -> int:
    """Private writable memory of this process, bytes (VmData)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))


def refused(nbytes: int) -> bool:
    """Whether the process cannot allocate so much."""
    try:
        torch.empty(nbytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        return True
    return False


def main() -> None:
    small, recipe, dist, headroom, weights = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
    quantize.build(quantize.load_recipe(small), quantize.BuildOptions(dist=f"{dist}-small", device="cpu"))
    before = allocated()
    resource.setrlimit(resource.RLIMIT_DATA, (before + headroom, before + headroom))
    bites = refused(weights)
    result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=dist, device="cpu"))
    print(json.dumps({"limit_bites": bites, "built": result.built, "before": before, "after": allocated()}))


if __name__ == "__main__":
    main()
