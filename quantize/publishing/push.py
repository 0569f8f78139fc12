"""Finished branches to their hub repos: what differs is uploaded, one commit a branch, ``main`` last.

The hub's state is read, compared by hash (SHA-256 of LFS files, git blob ids of others) and changed by one
``create_commit`` whose parent is the head that was read: a branch moves from whole to whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from quantize.errors import PushError
from quantize.files.notify import Notify
from quantize.hub.client import Hub, cause_of, is_passing, reason_of, retry_after, status_of
from quantize.planning.plan import Plan
from quantize.publishing.compare import BranchChange, compare
from quantize.publishing.finished import commit_message, finished_folders

ATTEMPTS = 5
FIRST_WAIT = 1.0


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
        self.plan, self.notify, self.pause = plan, notify, pause
        self.hub = Hub(endpoint)

    def changes(self) -> list[BranchChange]:
        """What differs between dist and the hub, variants first and each repo's ``main`` last. Changes nothing.

        Raises:
            ReleaseError: a selected branch is not built, or stale. PushError: the hub refuses.
        """
        folders = finished_folders(self.plan).items()
        found = [compare(self.hub, repo, branch, folder) for folder, (repo, branch) in folders]
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
            with self.hub.explained(repo):
                if create:
                    self.hub.api.create_repo(repo, private=private, exist_ok=True)
        made = []
        for change in self.changes():
            if change.is_needed:
                size = f"{change.upload_bytes / 1e9:.2f} GB"
                self.notify(f"pushing {change.repo} {change.branch}: {len(change.uploads)} files, {size}")
                self._apply(change)
                made.append(change)
            left = compare(self.hub, change.repo, change.branch, change.folder)
            if left.is_needed:
                raise PushError(
                    f"{change.repo} {change.branch}: after the push the hub still differs in "
                    f"{', '.join([*left.uploads, *left.deletes][:3])}; push again"
                )
        return made

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
                error = cause_of(raised)
                if error is None:
                    raise
                # an upload's address expires; the next attempt asks for a new one
                passing = is_passing(error) or (error is not raised and status_of(error) == 403)
                if attempt == ATTEMPTS or not passing:
                    raise self._said(change, error) from None
                now = compare(self.hub, change.repo, change.branch, change.folder)
                if not now.is_needed:
                    return  # the commit was made, only its answer was lost
                if now.head != change.head:
                    raise PushError(
                        f"{change.repo} {change.branch}: somebody else moved the branch meanwhile "
                        f"({str(change.head)[:12]} to {str(now.head)[:12]}); look at it, then push again"
                    ) from None
                self.notify(f"{change.repo} {change.branch}: {reason_of(error)}; trying again")
                self.pause(retry_after(error) or wait)
                wait *= 2

    def _create_branch(self, change: BranchChange) -> None:
        with self.hub.explained(change.repo):
            if change.branch != "main":
                first = self.hub.api.list_repo_commits(change.repo)[-1].commit_id
                self.hub.api.create_branch(change.repo, branch=change.branch, revision=first, exist_ok=True)
        again = compare(self.hub, change.repo, change.branch, change.folder)
        change.head, change.uploads, change.deletes = again.head, again.uploads, again.deletes

    def _commit(self, change: BranchChange) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(name, str(change.folder / name)) for name in change.uploads]
        removes = [CommitOperationDelete(name) for name in change.deletes]
        self.hub.api.create_commit(
            change.repo,
            [*adds, *removes],
            commit_message=commit_message(self.plan, change.branch),
            revision=change.branch,
            parent_commit=change.head,
        )

    def _said(self, change: BranchChange, error: Exception) -> PushError:
        return PushError(f"{change.repo} {change.branch}: {reason_of(error)}; nothing of this branch was changed")
