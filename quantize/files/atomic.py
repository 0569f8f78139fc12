"""Files that are there whole or not at all, and are on the disk when a call returns."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def as_json(data: Mapping[str, Any]) -> bytes:
    """JSON as the ecosystem writes it, in UTF-8 with a final newline."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def write_atomically(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write under a temporary name, fsync, rename.

    Args:
        scratch: where the temporary file lies, on the same filesystem; None is beside ``path``, which is for folders
            of our own, such as the cache, and for a place that the user names.
    """
    with replacing(path, scratch) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A new, empty file that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    What the block writes, it also flushes. ``scratch`` as for :func:`write_atomically`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    # never a file that is there already, be it a link to elsewhere
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        with _named(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give the file's name to what the system says of writing it; it gives it to what it says of opening alone."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and flush them; its times and permissions are not copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
