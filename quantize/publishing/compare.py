"""Compare dist with the hub: which files of a branch differ, and which were written by others and must not be touched.

A file on the hub is ours if the manifest beside it lists it with its present hash, or, for the card, if its last line
matches. All other files stay: they are listed, and replaced only if the user says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantize.dist.manifest import MANIFEST_NAME, MOST_BYTES
from quantize.dist.manifest_schema import problem
from quantize.hub.client import Hub, RemoteFile
from quantize.planning.items import PlannedLevel
from quantize.planning.plan import Plan
from quantize.publishing.finished import CARD, CARD_FILES, LocalFile, accounted, checked_files, files_of
from quantize.publishing.signature import is_blank, is_unedited

Published = Literal["yes", "differs", "no", "only there"]
KEPT = frozenset({".gitattributes"})
"""Files written by the hub: never deleted, never overwritten."""
MOST_READ = 20_000_000
"""Largest file outside LFS, in bytes, that is downloaded to see who wrote it; the hub accepts none above 10 MB."""


@dataclass
class BranchChange:
    """What a push would do to one branch.

    Attributes:
        head: the commit that was compared; None if the branch does not exist yet.
        uploads: bytes by file. deletes: our files on the hub that the branch no longer has.
        same: files that are already there.
        others: files on the hub that are not ours; they stay.
        cards: files of the card that somebody else wrote or edited; they stay too.
        blocked: files of the release whose names are taken by somebody else's files; a push refuses them.
        out_of_bounds: why what was measured of it is out of the recipe's bounds, by label; a push refuses it too.
        remote: names of all files of the branch on the hub. files: those of dist.
    """

    repo: str
    branch: str
    folder: Path
    head: str | None = None
    uploads: dict[str, int] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    same: int = 0
    others: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    out_of_bounds: Mapping[str, str] = field(default_factory=dict)
    remote: frozenset[str] = frozenset()
    files: Mapping[str, LocalFile] = field(default_factory=dict, repr=False)

    @property
    def is_needed(self) -> bool:
        return bool(self.uploads or self.deletes or self.head is None)

    @property
    def differs(self) -> bool:
        """Whether the hub differs from dist, including differences that a push would not change."""
        return bool(self.is_needed or self.cards or self.blocked or self.out_of_bounds)

    @property
    def upload_bytes(self) -> int:
        return sum(self.uploads.values())

    def as_data(self) -> dict[str, Any]:
        """The change as JSON data."""
        return {
            "repo": self.repo,
            "branch": self.branch,
            "head": self.head,
            "uploads": dict(self.uploads),
            "upload_bytes": self.upload_bytes,
            "deletes": list(self.deletes),
            "unchanged": self.same,
            "stays": [*self.cards, *self.others],
            "blocked": list(self.blocked),
            "out_of_bounds": dict(self.out_of_bounds),
        }


class Owner:
    """Tells which files of a branch on the hub are ours, from its manifest and card.

    Args:
        all_ours: whether a push has just created the branch, so that nobody else's files are in it.
    """

    def __init__(
        self, hub: Hub, repo: str, head: str, remote: Mapping[str, RemoteFile], *, all_ours: bool = False
    ) -> None:  # fmt: skip
        self.hub, self.repo, self.head, self.remote, self.all_ours = hub, repo, head, remote, all_ours

    def owns(self, name: str) -> bool:
        """Whether we wrote a file on the hub and nobody has changed it since."""
        if self.all_ours:
            return True
        if name == MANIFEST_NAME:
            return self.manifest is not None
        if name in CARD_FILES:
            return self._card_is_ours
        wanted = self._wanted.get(name)
        file = self.remote[name]
        if wanted is None:
            return False
        if wanted.startswith("git:"):
            return wanted == f"git:{file.blob_id}"
        if file.sha256 is not None:
            return wanted == file.sha256
        data = self._read(name)
        return data is not None and hashlib.sha256(data).hexdigest() == wanted

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest on the hub, if it is valid."""
        file = self.remote.get(MANIFEST_NAME)
        if file is None or file.nbytes > MOST_BYTES:
            return None
        try:
            data = json.loads(self.hub.read(self.repo, self.head, MANIFEST_NAME))
        except (ValueError, RecursionError):
            return None
        return data if problem(data) is None else None

    @cached_property
    def _wanted(self) -> dict[str, str]:
        return accounted(self.manifest) if self.manifest is not None else {}

    @cached_property
    def _card_is_ours(self) -> bool:
        data = self._read(CARD)
        return data is not None and (is_unedited(data) or is_blank(data))

    def _read(self, name: str) -> bytes | None:
        file = self.remote.get(name)
        if file is None or file.nbytes > MOST_READ:
            return None
        return self.hub.read(self.repo, self.head, name)


def compare(
    hub: Hub, change: BranchChange, files: Mapping[str, LocalFile], *, head: str | None, overwrite: Sequence[str] = (),
    all_ours: bool = False,
) -> BranchChange:  # fmt: skip
    """What a push of ``files`` would do to a branch; local files that the hub already has are read and checked.

    Args:
        change: names the branch. head: the branch's commit on the hub, None if it does not exist.
        overwrite: patterns of somebody else's files that may be replaced.
        all_ours: see :class:`Owner`.

    Raises:
        PushError: the hub refuses, or cannot be reached. ReleaseError: a file differs from what was built.
    """
    change = BranchChange(change.repo, change.branch, change.folder, head, files=files)
    if head is None:
        change.uploads = {name: file.nbytes for name, file in files.items()}
        return change
    remote = hub.files(change.repo, head)
    change.remote = frozenset(remote)
    owner = Owner(hub, change.repo, head, remote, all_ours=all_ours)
    for name, file in files.items():
        if name in remote and _is_same(file, remote[name]):
            change.same += 1
        elif name not in remote or owner.owns(name) or any(fnmatchcase(name, pattern) for pattern in overwrite):
            change.uploads[name] = file.nbytes
        else:
            (change.cards if name in CARD_FILES else change.blocked).append(name)
    for name in sorted(remote.keys() - files.keys() - KEPT):
        (change.deletes if owner.owns(name) else change.others).append(name)
    return change


def others_on(hub: Hub, repo: str, head: str, remote: Mapping[str, RemoteFile]) -> list[str] | None:
    """Files of a branch on the hub that we did not write, except its card; None if the whole branch is not ours.

    Raises:
        PushError: the hub refuses, or cannot be reached.
    """
    owner = Owner(hub, repo, head, remote)
    if owner.manifest is None:
        return None
    known = accounted(owner.manifest).keys() | CARD_FILES | KEPT | {MANIFEST_NAME}
    return sorted(remote.keys() - known)


def published(hub: Hub, plan: Plan) -> dict[str, Published]:
    """By label, whether each branch or level is on the hub as in dist: ``yes``, ``differs``, ``no``, or ``only there``
    if dist does not have it.

    Raises:
        PushError: the hub refuses, or cannot be reached.
    """
    standings = {repo: hub.look(repo) for repo in dict.fromkeys(item.repo for item in plan.everything)}
    changes: dict[Path, BranchChange] = {}
    found: dict[str, Published] = {}
    for item in plan.everything:
        if item.folder not in changes:
            standing = standings[item.repo]
            head = standing.heads.get(item.folder.name) if standing else None
            blank = BranchChange(item.repo, item.folder.name, item.folder)
            changes[item.folder] = compare(hub, blank, files_of(item.folder), head=head)
        found[item.label] = _published(plan, item, changes[item.folder])
    return found


def _published(plan: Plan, item: Any, change: BranchChange) -> Published:
    if isinstance(item, PlannedLevel):
        # levels share a branch; each is compared by its own files
        files = set(plan.finished(item).get("files") or {})
        if not files:
            return "only there" if item.file in change.remote else "no"
        if not files & {*change.uploads, *change.blocked}:
            return "yes"
        return "differs" if files & change.remote else "no"
    if not change.remote - KEPT:
        return "no"
    if not item.folder.is_dir():
        return "only there"
    return "differs" if change.differs else "yes"


def finished_changes(folders: Mapping[Path, tuple[str, str]]) -> list[BranchChange]:
    """One change per branch, variants first and each repo's ``main`` last, with files checked against the manifest by
    name and length.

    Raises:
        ReleaseError: a file was not written by a build, is missing, or has another length.
    """
    found = [
        BranchChange(repo, branch, folder, files=checked_files(folder)) for folder, (repo, branch) in folders.items()
    ]
    return sorted(found, key=lambda change: (change.repo, change.branch == "main"))


def _is_same(file: LocalFile, remote: RemoteFile) -> bool:
    if remote.nbytes != file.nbytes:
        return False
    if remote.sha256 is None:
        return remote.blob_id == file.blob_id
    if remote.sha256 != file.sha256:
        return False
    if file.wanted is not None:
        file.check()  # files that are not sent are read here, so that every file is checked against the manifest once
    return True
