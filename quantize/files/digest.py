"""Hashes of files and of plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_error, cache_folder

HASH_CHUNK = 1 << 20


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """As :func:`sha256_of_file`, remembered by path, size and modification time.

    Raises:
        OSError: the file cannot be read. CacheError: the hash cannot be remembered.
    """
    real = path.resolve()
    stat = real.stat()
    identity = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    entry = cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        return str(json.loads(entry.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    digest = sha256_of_file(real)
    try:
        write_atomically(entry, json.dumps({"sha256": digest}).encode())
    except OSError as error:
        raise cache_error(error) or error from None
    return digest


def key_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
