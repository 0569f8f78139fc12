"""What lies in the cache, how large it is, when it was last used, and how to free it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import BuildError
from quantize.files.cache import cache_folder

PARTS = {
    "sources": "models converted from GGUF",
    "gguf": "GGUF conversions and their headers",
    "statistics": "statistics kept for later variants",
    "measure": "the source's outputs on held-out texts",
    "hashes": "remembered hashes of files",
    "engines": "environments of other engines",
}
"""Parts that can be made again. What else lies in the cache (compiled kernels, the choice of a dtype) is small, and
lasting: another choice of dtype would give other bytes."""


@dataclass(frozen=True)
class Entry:
    """Something in the cache that is freed as a whole. ``age`` is in days since its last use."""

    part: str
    path: Path
    nbytes: int
    age: float


def touch(path: Path) -> None:
    """Note that an entry is used now."""
    with contextlib.suppress(OSError):  # a cache that is shared and read-only has no say in what is freed
        os.utime(path)


def entries() -> list[Entry]:
    """Everything in the cache that can be freed, by part."""
    now = time.time()
    found = []
    for part in PARTS:
        for path in sorted(_inside(cache_folder() / part)):
            with contextlib.suppress(FileNotFoundError):  # a build is at work in it
                found.append(Entry(part, path, *_measured(path, now)))
    return found


def free(entry: Entry) -> None:
    """Remove an entry: renamed first, so that half of it is never taken for a whole.

    Raises:
        BuildError: the cache cannot be written.
    """
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            doomed = entry.path.with_name(f".{entry.path.name}.{os.getpid()}.removed")
            os.rename(entry.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # somebody else freed it
    except OSError as error:
        raise BuildError(f"{entry.path}: cannot be removed: {error.strerror}") from None


def _inside(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _measured(path: Path, now: float) -> tuple[int, float]:
    """Bytes, and days since the latest change of it or of anything in it."""
    found = [path.lstat()]
    if path.is_dir() and not path.is_symlink():
        found += [inner.lstat() for inner in path.rglob("*")]
    last = max(stat.st_mtime for stat in found)
    return sum(stat.st_size for stat in found[1:] or found), max(0.0, (now - last) / 86400)
