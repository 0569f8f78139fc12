"""Find and remove branches and levels of earlier builds and pushes that are no longer in the recipe.

Only branches with our manifest are ever offered for removal; other people's branches are never touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from quantize.dist.layout import Dist, locked
from quantize.dist.manifest import (
    MANIFEST_NAME,
    Manifest,
    Recorded,
    described_files,
    read_manifest,
    update,
    without_level,
)
from quantize.errors import PushError, ReleaseError
from quantize.hub.client import Hub
from quantize.planning.plan import Plan
from quantize.publishing.compare import others_on

Where = Literal["dist", "hub"]


@dataclass(frozen=True)
class Orphan:
    """A branch, GGUF level or file that is no longer in the recipe.

    Attributes:
        where: ``dist`` or ``hub``. repo: its folder's name in dist, its id on the hub.
        branch: the branch. level: the level of a GGUF repo, else None.
        nbytes: its size. head: the commit on the hub that was read.
        file: a single file of a branch on the hub that we did not write. others: such files removed with a branch.
    """

    where: Where
    repo: str
    branch: str
    nbytes: int
    level: str | None = None
    head: str | None = None
    file: str | None = None
    others: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        part = self.level or self.file
        return f"{self.repo} {self.branch}" + (f" {part}" if part else "")

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether its level, file or branch matches one of the patterns."""
        return any(fnmatchcase(self.level or self.file or self.branch, pattern) for pattern in patterns)

    def as_data(self) -> dict[str, Any]:
        """The orphan as JSON data."""
        return asdict(self)


def orphans_in_dist(plan: Plan) -> list[Orphan]:
    """Built branches and levels in the repos' folders that are not in the plan.

    Raises:
        PlanError: a folder contains another model's release, which is not in the plan.
    """
    plan.require_own()
    known = {item.folder for item in plan.everything}
    found = []
    for parent in sorted({folder.parent for folder in known}):
        for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
            # links are not followed
            if (
                folder not in known
                and folder.is_dir()
                and not folder.is_symlink()
                and read_manifest(folder) is not None
            ):
                nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                found.append(Orphan("dist", parent.name, folder.name, nbytes))
    if plan.gguf:
        folder, wanted = plan.gguf.folder, {item.level for item in plan.gguf.levels}
        for level, entry in ((read_manifest(folder) or {}).get("levels") or {}).items():
            if level not in wanted:
                paths = [folder / name for name in _names(entry)]
                nbytes = sum(path.stat().st_size for path in paths if path.is_file())
                found.append(Orphan("dist", folder.parent.name, folder.name, nbytes, level))
    return found


def orphans_on_hub(plan: Plan, hub: Hub) -> list[Orphan]:
    """On the hub: branches of the plan's repos that quantize built and that are not in the plan, never ``main``; and
    files that we did not write in those of the plan's branches that we built.

    GGUF levels are files of ``main``: a push deletes those that dist no longer has.

    Raises:
        PushError: the hub refuses, or cannot be reached.
    """
    found = []
    for repo in sorted(set(plan.repos.values())):
        known = {item.folder.name for item in plan.everything if item.repo == repo} | {"main"}
        standing = hub.look(repo)
        for branch, head in sorted(standing.heads.items() if standing else ()):
            files = hub.files(repo, head)
            others = others_on(hub, repo, head, files) if MANIFEST_NAME in files else None
            if others is None:
                continue
            if branch in known:
                found += [Orphan("hub", repo, branch, files[name].nbytes, head=head, file=name) for name in others]
            else:
                nbytes = sum(file.nbytes for file in files.values())
                found.append(Orphan("hub", repo, branch, nbytes, head=head, others=tuple(others)))
    return found


def remove(plan: Plan, orphans: Sequence[Orphan], hub: Hub | None) -> None:
    """Remove orphans. A branch on the hub is deleted only if its head has not changed since it was read.

    Raises:
        BuildError: a build is running in dist. PushError: the hub refuses, or a branch was moved meanwhile.
    """
    local = [orphan for orphan in orphans if orphan.where == "dist"]
    if local:
        with locked(plan.dist, create=False) as held:
            for orphan in local:
                _remove_level(held, orphan, orphan.level) if orphan.level else _remove_folder(held, orphan)
    there: dict[tuple[str, str], list[Orphan]] = {}
    for orphan in orphans:
        if orphan.where == "hub":
            there.setdefault((orphan.repo, orphan.branch), []).append(orphan)
    for (repo, branch), group in there.items():
        if hub is None:
            continue
        head = group[0].head
        if head is None or hub.heads(repo).get(branch) != head:
            raise PushError(f"{group[0].label}: somebody moved the branch meanwhile; look at it, then prune again")
        names = [orphan.file for orphan in group if orphan.file]
        if names:
            hub.delete_files(repo, branch, head, names)
        else:
            hub.delete_branch(repo, branch)


def _remove_folder(held: Dist, orphan: Orphan) -> None:
    # rename it first, in one step, so that a killed prune leaves no partial branch under its real name
    gone = held.work / "pruned" / orphan.repo / orphan.branch
    gone.parent.mkdir(parents=True, exist_ok=True)
    os.rename(held.folder / orphan.repo / orphan.branch, gone)
    shutil.rmtree(gone)


def _remove_level(held: Dist, orphan: Orphan, level: str) -> None:
    folder, gone = held.folder / orphan.repo / orphan.branch, set[str]()

    def shorter(known: Manifest | None) -> Manifest:
        if known is None or level not in (known.get("levels") or {}):
            raise ReleaseError(f"{orphan.label}: no longer exists; look at {folder}, then prune again")
        gone.update(_names(known["levels"][level]))
        return without_level(known, level)

    data = update(held, folder, shorter)
    for name in sorted(gone - {*described_files(data), MANIFEST_NAME}):
        (folder / name).unlink(missing_ok=True)


def _names(entry: Recorded) -> list[str]:
    """A level's GGUF files beside its manifest."""
    return [name for name in entry.get("files", {}) if Path(name).name == name and name.endswith(".gguf")]
