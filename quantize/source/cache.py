"""The cache: converted sources and remembered file hashes. Everything in it can be made again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

HASH_CHUNK = 1 << 20


def cache_folder() -> Path:
    """``$QUANTIZE_CACHE``, or ``quantize`` below the user's cache directory."""
    explicit = os.environ.get("QUANTIZE_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quantize"


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """As :func:`sha256_of_file`, remembered by path, size and modification time."""
    real = path.resolve()
    stat = real.stat()
    identity = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    entry = cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    try:
        return str(json.loads(entry.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    digest = sha256_of_file(real)
    write_atomically(entry, json.dumps({"sha256": digest}).encode())
    return digest


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
