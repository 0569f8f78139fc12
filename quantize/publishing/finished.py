"""What of a plan lies finished in dist: the folders that may leave this machine, and their files' hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ReleaseError
from quantize.files.digest import cached_sha256
from quantize.planning.plan import Plan


@dataclass(frozen=True)
class LocalFile:
    """A file of a finished branch, with both of the hashes that git and the hub know files by."""

    path: Path
    nbytes: int

    @property
    def sha256(self) -> str:
        return cached_sha256(self.path)

    @property
    def blob_id(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % self.nbytes)
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def finished_folders(plan: Plan) -> dict[Path, tuple[str, str]]:
    """The selected branches' folders, each with its repo and branch on the hub.

    Raises:
        ReleaseError: one of them is not built, or stale.
    """
    found: dict[Path, tuple[str, str]] = {}
    for item in plan.everything:
        if item.label not in plan.selected:
            continue
        if item.state != "fresh":
            raise ReleaseError(
                f"{item.label}: {item.state}, {item.why}; run `quantize build` first, or leave it out (--only)"
            )
        found[item.folder] = item.repo, item.folder.name
    return found


def files_of(folder: Path) -> dict[str, LocalFile]:
    """The files of a branch's folder by their names in the repo; hidden ones are no part of it.

    Raises:
        ReleaseError: one is a link to somewhere else, whose content is not the branch's to give away.
    """
    found, inside = {}, folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            if not path.resolve().is_relative_to(inside):
                raise ReleaseError(f"{path}: is a link out of its branch; put the file itself there, or remove it")
            found[name.as_posix()] = LocalFile(path, path.stat().st_size)
    return found


def commit_message(plan: Plan, branch: str) -> str:
    """Of the one commit that brings a branch to what lies in dist."""
    return f"{plan.recipe.model.name or plan.source.short_name}: {branch}"
