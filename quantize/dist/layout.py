"""A branch's folder: assembled under a temporary name, flushed, and moved into place in one rename."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantize.errors import BuildError
from quantize.files.atomic import sync_folder
from quantize.files.digest import sha256_of_file

WORK_FOLDER = ".quantize"
"""Inside dist: the lock and everything unfinished. Nothing else unfinished is ever visible in dist."""

LOCK, UNFINISHED = "lock", "unfinished"
"""Inside the work folder: what stays there. Builds that can be gone on with lie in ``unfinished``."""

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what write_atomically leaves behind when it is killed


@contextmanager
def locked(dist: Path) -> Iterator[Path]:
    """Hold the only build in ``dist``; yields its work folder, emptied of what cannot be gone on with.

    Raises:
        BuildError: another build holds it, or the folder cannot be written.
    """
    work = dist / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / LOCK).open("a+")
    except OSError as error:
        raise BuildError(f"{dist}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BuildError(
                f"{dist}: another build is running in it; wait for it, or build with another --dist"
            ) from None
        _restore(dist, work)
        try:
            yield work
        finally:
            _restore(dist, work)


def publish(staged: Path, target: Path, work: Path) -> None:
    """Put the finished folder ``staged`` in the place of ``target``, whose old content is kept until then."""
    sync_folder(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = work / "replaced" / target.parent.name / target.name
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(parents=True, exist_ok=True)
        os.rename(target, old)
        os.rename(staged, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(staged, target)
    sync_folder(target.parent)


def describe_files(folder: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below ``folder``, by relative name; ``known`` are not read again."""
    return {
        path.relative_to(folder).as_posix(): known.get(path.relative_to(folder).as_posix())
        or {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _restore(dist: Path, work: Path) -> None:
    """Bring back a branch whose replacement did not arrive, and remove what no build can go on with."""
    for depth in ("*/.*.tmp", "*/*/.*.tmp"):
        for temporary in dist.glob(depth):
            if TEMPORARY.fullmatch(temporary.name):
                temporary.unlink(missing_ok=True)
    for old in (work / "replaced").glob("*/*"):
        target = dist / old.parent.name / old.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old, target)
    for leftover in work.iterdir():
        if leftover.name in {LOCK, UNFINISHED}:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    with suppress(OSError):  # there is something in it, or it is not there
        (work / UNFINISHED).rmdir()
