"""Hashes of files and of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder

HASH_CHUNK = 1 << 20

Found = Mapping[str, Any]
"""What was found out about a file's bytes, as JSON; ``sha256`` is one of its keys."""


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """As :func:`sha256_of_file`, remembered for as long as the file seems untouched."""
    return str(remembered(path, lambda real: {"sha256": sha256_of_file(real)}, {"sha256"})["sha256"])


def remembered(path: Path, find: Callable[[Path], Found], keys: set[str]) -> Found:
    """What ``find`` says of a file, remembered for as long as :func:`identity_of` stays the same.

    Args:
        find: reads the file at its real path. keys: what the answer holds; an older one that lacks some is not used.

    Raises:
        SourceError: somebody writes to the file while it is read.
    """
    real = path.resolve()
    identity = identity_of(real)
    entry = _entry(identity)
    with suppress(OSError, ValueError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if isinstance(known, dict) and keys <= known.keys():
            return known
    found = find(real)
    if identity_of(real) != identity:
        raise SourceError(f"{path}: is being written to while it is read; wait until it is whole, and try again")
    with suppress(OSError):  # a cache that cannot be written costs the time of another reading
        write_atomically(entry, json.dumps(found).encode())
    return found


def forget(path: Path) -> None:
    """Read the file anew next time: what is remembered of it was found to be wrong."""
    with suppress(OSError):
        _entry(identity_of(path.resolve())).unlink(missing_ok=True)


def identity_of(real: Path) -> str:
    """By what a file is taken for the same as before: real path, size, times of its last changes, inode.

    The time of the last change of the inode is one of them, because no program can set it: ``cp -p``, ``rsync -t`` and
    ``touch`` give a file the size and modification time of another, but not this.
    """
    stat = real.stat()
    return f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"


def _entry(identity: str) -> Path:
    return cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()


def key_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
