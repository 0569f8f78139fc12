"""Finished branches to their hub repos: what differs is uploaded, one commit a branch, ``main`` last.

The hub's state is read, compared by hash (SHA-256 of LFS files, git blob ids of others) and changed by one
``create_commit`` whose parent is the head that was read: a branch moves from whole to whole or not at all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.errors import PushError
from quantize.planning import Plan
from quantize.release.finished import LocalFile, commit_message, files_of, finished_folders
from quantize.source.hub import is_network
from quantize.source.resolved import Notify

KEPT = frozenset({".gitattributes"})
"""Files that the hub wrote itself: never deleted, never overwritten."""
ATTEMPTS = 5
FIRST_WAIT = 1.0


@dataclass
class BranchChange:
    """What a push would do to one branch.

    Attributes:
        head: the commit that was read; None where the branch does not exist yet.
        uploads: bytes by file. deletes: files of the hub that the branch has no more. same: files left alone.
    """

    repo: str
    branch: str
    folder: Path
    head: str | None = None
    uploads: dict[str, int] = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    same: int = 0

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


class Pusher:
    """Compares and pushes the branches of a plan.

    Args:
        endpoint: of the hub; None is the ecosystem's default (``HF_ENDPOINT``). The token comes from the
            ecosystem's places only (``HF_TOKEN``, ``hf auth login``).
        pause: waits between attempts; tests pass one that does not.
    """

    def __init__(
        self, plan: Plan, endpoint: str | None = None, notify: Notify = lambda line: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        self.plan, self.notify, self.pause = plan, notify, pause
        self.api = HfApi(endpoint=endpoint)

    def changes(self) -> list[BranchChange]:
        """What differs between dist and the hub, variants first and each repo's ``main`` last. Changes nothing.

        Raises:
            ReleaseError: a selected branch is not built, or stale. PushError: the hub refuses.
        """
        found = []
        for folder, (repo, branch) in finished_folders(self.plan).items():
            found.append(self._compare(BranchChange(repo, branch, folder)))
        return sorted(found, key=lambda change: (change.repo, change.branch == "main"))

    def push(self, *, create: bool = True, private: bool | None = None) -> list[BranchChange]:
        """Bring the hub to what lies in dist.

        Returns:
            The changes that were made.

        Raises:
            ReleaseError: a selected branch is not built, or stale.
            PushError: refused, or a branch that somebody else moved meanwhile. What was pushed before stays whole.
        """
        # read first: nothing is created for a release that is not finished
        for repo in sorted({repo for repo, _ in finished_folders(self.plan).values()}):
            with self._explained(repo):
                if create:
                    self.api.create_repo(repo, private=private, exist_ok=True)
        made = []
        for change in self.changes():
            if change.is_needed:
                size = f"{change.upload_bytes / 1e9:.2f} GB"
                self.notify(f"pushing {change.repo} {change.branch}: {len(change.uploads)} files, {size}")
                self._apply(change)
                made.append(change)
            left = self._compare(BranchChange(change.repo, change.branch, change.folder))
            if left.is_needed:
                raise PushError(
                    f"{change.repo} {change.branch}: after the push the hub still differs in "
                    f"{', '.join([*left.uploads, *left.deletes][:3])}; push again"
                )
        return made

    # -- the hub

    def _compare(self, change: BranchChange) -> BranchChange:
        with self._explained(change.repo):
            remote, change.head = self._remote(change.repo, change.branch)
        local = files_of(change.folder)
        for name, file in local.items():
            if _is_same(file, remote.get(name)):
                change.same += 1
            else:
                change.uploads[name] = file.nbytes
        change.deletes = sorted(name for name in remote if name not in local and name not in KEPT)
        return change

    def _remote(self, repo: str, branch: str) -> tuple[Mapping[str, Any], str | None]:
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            refs = self.api.list_repo_refs(repo)
        except RepositoryNotFoundError:
            return {}, None
        head = next((ref.target_commit for ref in refs.branches if ref.name == branch), None)
        if head is None:
            return {}, None
        tree = self.api.list_repo_tree(repo, recursive=True, revision=head)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}, head

    def _apply(self, change: BranchChange) -> None:
        """One commit, tried again where that is safe: the answer to a commit that was made can be lost."""
        if change.head is None:
            self._create_branch(change)
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._commit(change)
                return
            except Exception as raised:
                error = _cause(raised)
                if error is None:
                    raise
                # an upload's address expires; the next attempt asks for a new one
                passing = _is_passing(error) or (error is not raised and _status(error) == 403)
                if attempt == ATTEMPTS or not passing:
                    raise self._said(change, error) from None
                now = self._compare(BranchChange(change.repo, change.branch, change.folder))
                if not now.is_needed:
                    return  # the commit was made, only its answer was lost
                if now.head != change.head:
                    raise PushError(
                        f"{change.repo} {change.branch}: somebody else moved the branch meanwhile "
                        f"({str(change.head)[:12]} to {str(now.head)[:12]}); look at it, then push again"
                    ) from None
                self.notify(f"{change.repo} {change.branch}: {_reason(error)}; trying again")
                self.pause(_retry_after(error) or wait)
                wait *= 2

    def _create_branch(self, change: BranchChange) -> None:
        with self._explained(change.repo):
            if change.branch != "main":
                first = self.api.list_repo_commits(change.repo)[-1].commit_id
                self.api.create_branch(change.repo, branch=change.branch, revision=first, exist_ok=True)
        again = self._compare(BranchChange(change.repo, change.branch, change.folder))
        change.head, change.uploads, change.deletes = again.head, again.uploads, again.deletes

    def _commit(self, change: BranchChange) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(name, str(change.folder / name)) for name in change.uploads]
        removes = [CommitOperationDelete(name) for name in change.deletes]
        self.api.create_commit(
            change.repo,
            [*adds, *removes],
            commit_message=commit_message(self.plan, change.branch),
            revision=change.branch,
            parent_commit=change.head,
        )

    @contextmanager
    def _explained(self, repo: str) -> Iterator[None]:
        try:
            yield
        except Exception as raised:
            if (error := _cause(raised)) is not None:
                raise PushError(f"{repo}: {_reason(error)}") from None
            raise

    def _said(self, change: BranchChange, error: Exception) -> PushError:
        return PushError(f"{change.repo} {change.branch}: {_reason(error)}; nothing of this branch was changed")


def _is_same(file: LocalFile, remote: Any) -> bool:
    if remote is None or remote.size != file.nbytes:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.sha256)
    return bool(remote.blob_id == file.blob_id)


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException | None) -> Exception | None:
    """The hub's answer or the network's failure behind an error, which the client may have wrapped; None if neither."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, Exception) and (isinstance(error, HfHubHTTPError | OSError) or is_network(error)):
            return error
        error = error.__cause__
    return None


def _is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed: no answer, too many requests, or the server's own fault."""
    status = _status(error)
    return status is None or status in {408, 409, 412, 429} or status >= 500


def _retry_after(error: Exception) -> float | None:
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _reason(error: Exception) -> str:
    """One sentence, without addresses or tokens."""
    status = _status(error)
    known = {
        401: "the hub does not accept the token; log in with `hf auth login` or set HF_TOKEN",
        403: "this account may not write to the repo; use a token with write permission",
        404: "no such repo on the hub, or it is private to somebody else",
        412: "the branch moved while it was written",
        429: "the hub asks to slow down",
    }
    if status in known:
        return known[status]
    if status is not None:
        return f"the hub answered with status {status}"
    return f"the hub could not be reached ({type(error).__name__})"
