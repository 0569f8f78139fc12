"""Push finished branches to their hub repos: upload what differs, in one commit per branch, ``main`` last.

The hub is read before anything is created. Files are compared by hash (SHA-256 of LFS files, git blob ids of others)
and changed by one ``create_commit`` whose parent is the head that was read: a branch is updated completely or not at
all, and only our files in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantize.errors import HubInputError, PushError
from quantize.hub.client import Hub, Standing
from quantize.hub.errors import AskedToWait, cause_of, is_passing, own_error, server_text, status_of
from quantize.hub.retry import Patience, patient, sleep
from quantize.options import PushOptions
from quantize.planning.plan import Plan
from quantize.publishing.bounds import out_of_bounds_in, refuse_out_of_bounds
from quantize.publishing.compare import BranchChange, compare, finished_changes
from quantize.publishing.finished import commit_message, finished_folders
from quantize.publishing.upload import addition
from quantize.reporter import SILENT, Reporter

ATTEMPTS = 5
FIRST_WAIT = 1.0
LOST = frozenset({400, 403, 404, 422})
"""Upload statuses after which a new upload, with a new address, may succeed."""


class Pusher:
    """Compares and pushes the branches of a plan.

    Args:
        options: which hub, and what may be created and replaced there. The token comes from the ecosystem's places
            only (``HF_TOKEN``, ``hf auth login``).
        pause: waits between attempts; tests pass one that does not.

    Raises:
        HubInputError: the endpoint is not an address, or the token is malformed.
    """

    def __init__(
        self,
        plan: Plan,
        options: PushOptions | None = None,
        reporter: Reporter = SILENT,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self.options = options or PushOptions()
        self.plan, self.reporter, self.overwrite = plan, reporter, self.options.overwrite
        self.patience = Patience(reporter, pause, ATTEMPTS, FIRST_WAIT)
        self.hub = Hub(self.options.endpoint, reporter, self.patience)

    def changes(self) -> list[BranchChange]:
        """Differences between dist and the hub, variants first and each repo's ``main`` last. Changes nothing.

        Raises:
            ReleaseError: a selected branch is not built, stale, or damaged. PushError: the hub refuses.
        """
        branches = finished_changes(finished_folders(self.plan))
        standings = {repo: self.hub.look(repo) for repo in dict.fromkeys(change.repo for change in branches)}
        found = [self._compare(change, standings[change.repo]) for change in branches]
        for change in found:
            if not self.options.force:
                change.out_of_bounds = out_of_bounds_in(self.plan, change.folder)
            for name in change.uploads:
                change.files[name].check()  # a push would check it while sending
        return found

    def push(self) -> list[BranchChange]:
        """Update the hub to dist.

        Returns:
            The changes that were made.

        Raises:
            ReleaseError: a selected branch is not built, stale, damaged, or out of the recipe's bounds.
            HubInputError: a repo was renamed, or is public although ``private`` was requested.
            PushError: the hub refuses; somebody else's file has the name of one of ours; or somebody moved a branch
                meanwhile. Branches pushed before stay complete.
        """
        # check first, so that nothing is created for a release that is not finished or cannot be pushed
        folders = finished_folders(self.plan)
        if not self.options.force:
            refuse_out_of_bounds(self.plan, folders)
        branches = finished_changes(folders)
        standings = {repo: self._look(repo) for repo in dict.fromkeys(change.repo for change in branches)}
        changes = [self._compare(change, standings[change.repo]) for change in branches]
        _stop_at_blocked(changes)
        for repo, standing in standings.items():
            if standing is None:
                self._create(repo)
        return [change for change in changes if self._push(change)]

    def _look(self, repo: str) -> Standing | None:
        """The repo's present state, reported before anything is changed."""
        standing = self.hub.look(repo)
        if standing is None:
            if not self.options.create:
                raise PushError(
                    f"{repo}: no such repo on the hub, or it is private to somebody else; push without --no-create to "
                    "create it"
                )
            return None
        if self.options.private and standing.is_private is not True:
            seen = "public" if standing.is_private is False else "there, but the hub does not say that it is private"
            raise HubInputError(
                f"{repo}: is {seen}, and --private changes no existing repo; make it private on the hub, or push "
                "without --private"
            )
        self.reporter.say(f"{repo}: {standing}")
        return standing

    def _create(self, repo: str) -> None:
        private = self.options.private
        self.reporter.say(f"{repo}: does not exist yet; creating it{' as a private repo' if private else ''}")
        self.hub.create(repo, private=private)
        standing = self.hub.look(repo)
        if standing is None:
            raise PushError(f"{repo}: could not be created, or this account cannot see it; is it somebody else's?")
        if self.options.private and standing.is_private is False:
            raise PushError(f"{repo}: somebody created it as a public repo meanwhile; make it private, then push again")

    def _push(self, change: BranchChange) -> bool:
        """Update one branch to dist; False if nothing had to be changed."""
        needed = change.is_needed
        if needed:
            size = f"{change.upload_bytes / 1e9:.2f} GB"
            self.reporter.say(f"pushing {change.repo} {change.branch}: {len(change.uploads)} files, {size}")
            if change.head is None:
                self._create_branch(change)
            for name in change.deletes:
                self.reporter.say(f"deleting {change.repo} {change.branch} {name}, which is no longer in the release")
            self._apply(change)
        left = self._again(change)
        if left.is_needed:
            raise PushError(
                f"{change.repo} {change.branch}: after the push the hub still differs in "
                f"{', '.join([*left.uploads, *left.deletes][:3])}; push again"
            )
        return needed

    def _compare(self, change: BranchChange, standing: Standing | None) -> BranchChange:
        head = standing.heads.get(change.branch) if standing else None
        found = compare(self.hub, change, change.files, head=head, overwrite=self.overwrite)
        if (found.blocked or found.cards or found.others) and self._is_untouched(change, head):
            found = compare(self.hub, change, change.files, head=head, all_ours=True)
        return found

    def _again(self, change: BranchChange) -> BranchChange:
        head = self.hub.heads(change.repo).get(change.branch)
        found = compare(self.hub, change, change.files, head=head, overwrite=self.overwrite)
        if head == change.head and (found.blocked or found.cards or found.others) and self._is_untouched(change, head):
            found = compare(self.hub, change, change.files, head=head, all_ours=True)
        return found

    def _is_untouched(self, change: BranchChange, head: str | None) -> bool:
        """Whether a branch is still as a push creates it: at the repo's first commit, with main's files."""
        return change.branch != "main" and head is not None and head == self.hub.first_commit(change.repo)

    def _create_branch(self, change: BranchChange) -> None:
        if change.branch != "main":
            self.hub.create_branch(change.repo, change.branch, self.hub.first_commit(change.repo))
        found = self._compare(change, Standing(None, self.hub.heads(change.repo)))
        _stop_at_blocked([found])
        change.head, change.uploads, change.deletes = found.head, found.uploads, found.deletes
        change.others, change.cards, change.remote = found.others, found.cards, found.remote

    def _apply(self, change: BranchChange) -> None:
        """Make one commit, retrying only if that is safe: the answer to a successful commit can be lost."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._commit(change)
                return
            except Exception as raised:
                if (own := own_error(raised)) is not None:
                    raise own from None
                error = cause_of(raised)
                # upload addresses expire, and the storage may lose data: the next attempt starts from the beginning
                stored = error is not None and isinstance(raised, RuntimeError) and status_of(error) in LOST
                if error is None or not (is_passing(error) or stored):
                    raise self._push_error(change, raised, stored) from None
                now = self._again(change)
                if not now.is_needed:
                    return  # the commit succeeded, only its answer was lost
                if now.head != change.head:
                    raise PushError(
                        f"{change.repo} {change.branch}: somebody else moved the branch meanwhile "
                        f"({str(change.head)[:12]} to {str(now.head)[:12]}); look at it, then push again"
                    ) from None
                if attempt == ATTEMPTS:
                    raise self._push_error(change, raised, stored) from None
                try:
                    self.patience.wait(error, attempt, _stored(error) if stored else None)
                except AskedToWait as asked:
                    raise self._push_error(change, asked, False) from None

    def _commit(self, change: BranchChange) -> None:
        from huggingface_hub import CommitOperationDelete

        adds = [addition(name, change.files[name]) for name in change.uploads]
        removes = [CommitOperationDelete(name) for name in change.deletes]
        with self.hub.storage(change.repo, change.branch), patient(self.patience):
            self.hub.api.create_commit(
                change.repo,
                [*adds, *removes],
                commit_message=commit_message(self.plan, change.branch),
                revision=change.branch,
                parent_commit=change.head,
            )

    def _push_error(self, change: BranchChange, raised: Exception, stored: bool) -> PushError:
        if stored:
            reason = _stored(cause_of(raised) or raised)
        else:
            found = self.hub.reason(raised, change.repo)
            if found is None and not isinstance(raised, RuntimeError):
                raise raised
            reason = found or "the upload by Xet failed; try HF_HUB_DISABLE_XET=1"
        return PushError(f"{change.repo} {change.branch}: {reason}; nothing of this branch was changed")


def _stored(error: Exception) -> str:
    told = server_text(error)
    return f"the hub's storage did not store the upload (status {status_of(error)}{', ' + told if told else ''})"


def _stop_at_blocked(changes: Sequence[BranchChange]) -> None:
    for change in changes:
        if change.blocked:
            more = f" and {len(change.blocked) - 3} more" if len(change.blocked) > 3 else ""
            raise PushError(
                f"{change.repo} {change.branch}: {', '.join(change.blocked[:3])}{more} on the hub "
                f"{'was' if len(change.blocked) == 1 else 'were'} not written by quantize, or changed since; nothing "
                f"was changed; to replace {'it' if len(change.blocked) == 1 else 'them'}, push with --overwrite NAME"
            )
