"""A source held against its hashes whenever its bytes are used. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize.errors import SourceChanged
from quantize.files.digest import HASH_CHUNK, forget
from quantize.source.fingerprints import really_read_sha256
from quantize.source.resolved import Source

GIT = "git:"
"""What the hash of a small file on the hub begins with: the id of its blob follows."""


def changed(path: Path, what: str = "") -> SourceChanged:
    """The error where a file of the source, or a tensor ``what`` in it, is not what its hash says."""
    forget(path)  # whatever it is by now, it is hashed anew for the next plan
    return SourceChanged(
        f"{path}: {what + ' ' if what else ''}changed after the file was hashed, so nothing made of it is published; "
        "put the old file back to go on, or build again for a release of the new one"
    )


@contextmanager
def guarded(source: Source) -> Iterator[None]:
    """Whatever is read of the small files while inside is what their hashes say.

    Raises:
        SourceChanged: one of them is another file than the one that was hashed.
    """
    check_small_files(source)
    yield
    check_small_files(source)


def check_small_files(source: Source) -> None:
    """Read the config and all files that are carried over, and compare their hashes.

    Raises:
        SourceChanged: one is gone, or another than the one that was hashed.
    """
    folder = source.small_files if source.checkpoint.folder is None else source.checkpoint.folder
    if folder is None:
        return
    for name in {"config.json", *source.carried_over} & source.hashes.keys():
        _read(folder / name, source.hashes[name])


def check_weights(source: Source) -> None:
    """Hold all weights against their hashes. What this process has read and held against them already, and nobody has
    touched since, is not read again.

    Raises:
        SourceChanged: a file is another than the one that was hashed.
    """
    for name, known in source.fingerprints.items():
        path = source.folder / name
        try:
            found = really_read_sha256(path)
        except OSError:
            raise changed(path) from None
        if found != known.sha256:
            raise changed(path)


def copy_unchanged(source: Source, name: str, target: Path) -> None:
    """Copy a small file of the source and flush it; its times and permissions are not copied.

    Raises:
        SourceChanged: it is another file than the one that was hashed.
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
