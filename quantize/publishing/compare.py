"""Dist against the hub: what of a branch differs, by the hashes that both sides know files by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantize.hub.client import Hub
from quantize.planning.levels import PlannedLevel
from quantize.planning.plan import Plan
from quantize.publishing.finished import LocalFile, files_of

Published = Literal["yes", "differs", "no", "only there"]
KEPT = frozenset({".gitattributes"})
"""Files that the hub wrote itself: never deleted, never overwritten."""


@dataclass
class BranchChange:
    """What a push would do to one branch.

    Attributes:
        head: the commit that was read; None where the branch does not exist yet.
        uploads: bytes by file. deletes: files of the hub that the branch has no more. same: files left alone.
        remote: names of all files that the hub's branch has.
    """

    repo: str
    branch: str
    folder: Path
    head: str | None = None
    uploads: dict[str, int] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    same: int = 0
    remote: frozenset[str] = frozenset()

    @property
    def is_needed(self) -> bool:
        return bool(self.uploads or self.deletes or self.head is None)

    @property
    def upload_bytes(self) -> int:
        return sum(self.uploads.values())

    def as_data(self) -> dict[str, Any]:
        """The change for machines."""
        return {
            "repo": self.repo,
            "branch": self.branch,
            "head": self.head,
            "uploads": dict(self.uploads),
            "upload_bytes": self.upload_bytes,
            "deletes": list(self.deletes),
            "unchanged": self.same,
        }


def compare(hub: Hub, repo: str, branch: str, folder: Path) -> BranchChange:
    """What a push of ``folder`` would do to a branch.

    Raises:
        PushError: the hub refuses, or cannot be reached.
    """
    change = BranchChange(repo, branch, folder, head=hub.heads(repo).get(branch))
    remote = hub.files(repo, change.head) if change.head else {}
    change.remote = frozenset(remote)
    local = files_of(folder)
    for name, file in local.items():
        if _is_same(file, remote.get(name)):
            change.same += 1
        else:
            change.uploads[name] = file.nbytes
    change.deletes = sorted(name for name in remote if name not in local and name not in KEPT)
    return change


def published(hub: Hub, plan: Plan) -> dict[str, Published]:
    """By label, whether the hub holds each branch or level as it lies in dist: ``yes``, ``differs``, ``no``, or
    ``only there`` where dist has none.

    Raises:
        PushError: the hub refuses, or cannot be reached.
    """
    changes: dict[Path, BranchChange] = {}
    found: dict[str, Published] = {}
    for item in plan.everything:
        if item.folder not in changes:
            changes[item.folder] = compare(hub, item.repo, item.folder.name, item.folder)
        found[item.label] = _published(plan, item, changes[item.folder])
    return found


def _published(plan: Plan, item: Any, change: BranchChange) -> Published:
    if isinstance(item, PlannedLevel):
        # many levels share a branch; each is judged by its own files
        files = set(plan.finished(item).get("files") or {})
        if not files:
            return "only there" if item.file in change.deletes else "no"
        if not files & change.uploads.keys():
            return "yes"
        return "differs" if files & change.remote else "no"
    if not change.remote - KEPT:
        return "no"
    if not item.folder.is_dir():
        return "only there"
    return "differs" if change.is_needed else "yes"


def _is_same(file: LocalFile, remote: Any) -> bool:
    if remote is None or remote.size != file.nbytes:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.sha256)
    return bool(remote.blob_id == file.blob_id)
