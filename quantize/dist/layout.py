"""A dist: its lock, its work folder, and how finished things reach their places in one rename.

``dist/<repo>/<branch>/`` holds finished work and nothing else; the user may keep files of his own beside it. All that
is unfinished or temporary lies below ``dist/.quantize/``, and only there is anything ever cleared away.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from quantize.errors import BuildError, ReleaseError
from quantize.files.atomic import copy_file, replacing, sync_folder, write_atomically
from quantize.files.digest import sha256_of_file
from quantize.files.lock import LockHeld, LocksUnsupported, exclusive_lock

WORK_FOLDER = ".quantize"
"""Inside dist: the lock and everything unfinished. Nothing else unfinished is ever visible in dist."""

LOCK, ORIGINS, UNFINISHED = "lock", "origins.json", "unfinished"
"""Inside the work folder: what stays there. Builds that can be resumed lie in ``unfinished``; ``origins.json`` is
described in ``origins.py``."""


class FileEntry(TypedDict):
    """A file of a branch: its bytes and their SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Dist:
    """A dist whose lock this process holds: the only way to write into one.

    Attributes:
        folder: the dist itself.
    """

    folder: Path

    @property
    def work(self) -> Path:
        """For what is unfinished."""
        return self.folder / WORK_FOLDER

    @property
    def scratch(self) -> Path:
        """For files on their way to their places; cleared by whoever takes the lock next."""
        return self.work / "tmp"

    def write(self, path: Path, data: bytes) -> None:
        """Put a file into its place, whole.

        Raises:
            BuildError: its place is on another filesystem.
        """
        with _one_filesystem(path, self.work):
            write_atomically(path, data, self.scratch)

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """As :func:`quantize.files.atomic.replacing`, from the scratch folder."""
        with _one_filesystem(path, self.work), replacing(path, self.scratch) as temporary:
            yield temporary

    def copy(self, source: Path, target: Path) -> None:
        """Put a copy of a file into its place, whole."""
        with self.replacing(target) as temporary:
            copy_file(source, temporary)


@contextmanager
def locked(dist: Path, *, create: bool = True) -> Iterator[Dist]:
    """Hold the only build in ``dist``, after clearing its work folder of what no build can resume from.

    Args:
        create: make the folder where there is none; a command that only changes what is finished does not.

    Raises:
        BuildError: another build holds it, or the folder cannot be written. ReleaseError: it is not there.
    """
    held = Dist(dist)
    try:
        if not create and not dist.is_dir():
            raise ReleaseError(f"{dist}: there is no such folder, so nothing is built in it; run `quantize build` first")
        held.work.mkdir(parents=True, exist_ok=True)
        if held.work.is_symlink():
            raise BuildError(f"{held.work}: is a link, but what lies in it gets removed; put a folder in its place")
    except OSError as error:
        raise BuildError(f"{dist}: cannot be written: {error.strerror}") from None
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(held.work / LOCK))
        except LockHeld:
            raise BuildError(
                f"{dist}: another build is running in it; wait for it, or build with another --dist"
            ) from None
        except LocksUnsupported as error:
            raise BuildError(f"{dist}: cannot be locked on its filesystem: {error}") from None
        except OSError as error:
            raise BuildError(f"{dist}: cannot be written: {error.strerror}") from None
        _restore(dist, held.work)
        try:
            yield held
        finally:
            _restore(dist, held.work)


def dist_of(folder: Path) -> Path | None:
    """The dist that a branch's folder lies in, ``<dist>/<repo>/<branch>``; None for a folder that lies in none."""
    dist = folder.resolve().parent.parent
    work = dist / WORK_FOLDER
    return dist if work.is_dir() and not work.is_symlink() else None


def place_problem(dist: Path, folder: Path) -> str | None:
    """Why a branch's folder cannot be written as part of ``dist``; None where it can, or where neither exists yet."""
    if not folder.resolve().is_relative_to(dist.resolve()):
        return f"is a link that leads out of {dist}; put the folder itself there, or remove it"
    between = [path for path in (folder, *folder.parents) if path.is_relative_to(dist) and path.exists()]
    if len({path.stat().st_dev for path in between}) > 1:
        return (
            f"is on another filesystem than {dist / WORK_FOLDER}, from which finished branches are moved into place; "
            "keep one dist on one filesystem"
        )
    return None


def publish(staged: Path, target: Path, work: Path) -> None:
    """Put the finished folder ``staged`` in the place of ``target``, whose old content is kept until then.

    Raises:
        BuildError: the place is on another filesystem.
    """
    sync_folder(staged)
    with _one_filesystem(target, work):
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


def describe_files(folder: Path, known: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """Bytes and SHA-256 of every file below ``folder``, by relative name; ``known`` are not read again."""
    return {
        path.relative_to(folder).as_posix(): known.get(path.relative_to(folder).as_posix())
        or {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _one_filesystem(target: Path, work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise BuildError(
            f"{target}: is on another filesystem than {work}, from which it is moved into place; "
            "keep one dist on one filesystem"
        ) from None


def _restore(dist: Path, work: Path) -> None:
    """Bring back a branch whose replacement did not arrive, and remove from the work folder what is of no more use."""
    for old in (work / "replaced").glob("*/*"):
        target = dist / old.parent.name / old.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(old, target)
    for leftover in work.iterdir():
        if leftover.name in {LOCK, ORIGINS, UNFINISHED}:
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    with suppress(OSError):  # there is something in it, or it is not there
        (work / UNFINISHED).rmdir()
