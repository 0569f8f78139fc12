"""Check a source's files against their hashes whenever they are used. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize.errors import SourceChanged
from quantize.files.digest import HASH_CHUNK, forget
from quantize.source.fingerprints import sha256_read_here
from quantize.source.resolved import Source

GIT = "git:"
"""Prefix of the hash of a small file on the hub, followed by its blob id."""


def changed(path: Path, what: str = "") -> SourceChanged:
    """Build the error for a source file, or a tensor ``what`` in it, that differs from its hash."""
    forget(path)  # the next plan hashes the file again
    return SourceChanged(
        f"{path}: {what + ' ' if what else ''}changed after the file was hashed, so nothing made of it is published; "
        "restore the old file to continue, or build again to release the new one"
    )


@contextmanager
def guarded(source: Source) -> Iterator[None]:
    """Context that checks, before and after, that the small files match their hashes.

    Raises:
        SourceChanged: a file differs from its hash.
    """
    check_small_files(source)
    yield
    check_small_files(source)


def check_small_files(source: Source) -> None:
    """Check the config and all files copied into releases against their hashes.

    Raises:
        SourceChanged: a file is missing, or differs from its hash.
    """
    folder = source.small_files if source.checkpoint.folder is None else source.checkpoint.folder
    if folder is None:
        return
    for name in {"config.json", *source.carried_over} & source.hashes.keys():
        _read(folder / name, source.hashes[name])


def check_weights(source: Source) -> None:
    """Check all weights against their hashes. Files that this process has already checked, and that are unchanged
    since, are not read again.

    Raises:
        SourceChanged: a file differs from its hash.
    """
    for name, known in source.fingerprints.items():
        path = source.folder / name
        try:
            found = sha256_read_here(path)
        except OSError:
            raise changed(path) from None
        if found != known.sha256:
            raise changed(path)


def copy_unchanged(source: Source, name: str, target: Path) -> None:
    """Copy a small file of the source and flush it; its times and permissions are not copied.

    Raises:
        SourceChanged: it differs from its hash.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as writer:
        _read(source.folder / name, source.hashes[name], writer)
        writer.flush()
        os.fsync(writer.fileno())


def _read(path: Path, expected: str, copy: Any = None) -> None:
    try:
        file = path.open("rb")
    except OSError:
        raise changed(path) from None
    with file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha1(b"blob %d\0" % size) if expected.startswith(GIT) else hashlib.sha256()
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            if copy is not None:
                copy.write(chunk)
    if digest.hexdigest() != expected.removeprefix(GIT):
        raise changed(path)
