"""Hub access shared by push, status, prune and lint. Every answer is checked, and every failure is one sentence.

The token comes only from the client's usual sources (``HF_TOKEN``, ``hf auth login``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quantize.errors import HubInputError, PushError
from quantize.hub.errors import NOT_THE_API, cause_of, malformed, own_error, reason_of, shown, status_of
from quantize.hub.retry import Patience, patient
from quantize.reporter import SILENT, Reporter

COMMIT_ID = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision. ``blob_id`` is git's; ``sha256`` is the content's, for files in LFS or Xet."""

    name: str
    nbytes: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Standing:
    """A repo's present state. ``is_private`` is None if the hub does not say; ``heads`` has a commit by branch."""

    is_private: bool | None
    heads: Mapping[str, str]

    def __str__(self) -> str:
        seen = {True: "private, ", False: "public, ", None: ""}[self.is_private]
        return f"is there: {seen}{'branches' if len(self.heads) != 1 else 'branch'} {', '.join(sorted(self.heads))}"


class Hub:
    """A hub's repos.

    Args:
        endpoint: address of the hub; None is the client's default (``HF_ENDPOINT``).
        patience: the rule for retries.

    Raises:
        HubInputError: the endpoint is not an address, or the token is malformed.
    """

    def __init__(
        self, endpoint: str | None = None, reporter: Reporter = SILENT, patience: Patience | None = None
    ) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        if not sys.stderr.isatty():
            disable_progress_bars()
        self.api = HfApi(endpoint=endpoint)
        check_access(self.api.endpoint)
        self.reporter, self.patience = reporter, patience or Patience(reporter)
        self._without_xet: dict[str, bool] = {}

    def look(self, repo: str) -> Standing | None:
        """A repo's present state; None if this account sees no such repo.

        Raises:
            HubInputError: the repo was renamed. PushError: the hub refuses, or cannot be reached.
        """
        with self.explained(repo):
            try:
                info = self.api.model_info(repo)
            except Exception as error:
                if is_missing(error):
                    return None
                raise
            name, private = info.id, info.private
        if not isinstance(name, str):
            raise PushError(f"{repo}: the hub {NOT_THE_API}")
        if name != repo:
            raise HubInputError(
                f"{repo}: was renamed to {shown(name)} on the hub; set `release.owner` or `release.repo` in the recipe "
                "to match this name, or rename the repo back"
            )
        return Standing(private if isinstance(private, bool) else None, self.heads(repo))

    def heads(self, repo: str) -> dict[str, str]:
        """The head commit of every branch; empty if there is no such repo."""
        with self.explained(repo):
            try:
                refs = self.api.list_repo_refs(repo)
            except Exception as error:
                if is_missing(error):
                    return {}
                raise
            heads = {ref.name: ref.target_commit for ref in refs.branches}
            for name, commit in heads.items():
                if not isinstance(name, str) or not name.isprintable() or not COMMIT_ID.fullmatch(commit):
                    raise ValueError(name)
        return heads

    def files(self, repo: str, revision: str) -> dict[str, RemoteFile]:
        """Files of a revision, by name."""
        from huggingface_hub import RepoFile

        with self.explained(repo):
            tree = self.api.list_repo_tree(repo, recursive=True, revision=revision)
            found = [_remote_file(entry) for entry in tree if isinstance(entry, RepoFile)]
        return {file.name: file for file in found}

    def read(self, repo: str, revision: str, name: str) -> bytes:
        """The content of a small file."""
        from urllib.parse import quote

        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self.explained(repo):
            url = f"{self.api.endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(name)}"
            response = get_session().get(url, headers=build_hf_headers(token=self.api.token))
            hf_raise_for_status(response)
            return bytes(response.content)

    def first_commit(self, repo: str) -> str:
        """The first commit of the repo's main branch."""
        with self.explained(repo):
            return str(self.api.list_repo_commits(repo)[-1].commit_id)

    def create(self, repo: str, *, private: bool | None) -> None:
        """Create a repo. It is not an error if the repo was created meanwhile."""
        with self.explained(repo):
            try:
                self.api.create_repo(repo, private=private, exist_ok=True)
            except Exception as error:
                cause = cause_of(error)
                if cause is None or status_of(cause) not in {400, 409} or "exist" not in str(error).lower():
                    raise

    def create_branch(self, repo: str, branch: str, start: str) -> None:
        """Create a branch at a commit; an existing branch stays unchanged."""
        with self.explained(repo):
            self.api.create_branch(repo, branch=branch, revision=start, exist_ok=True)

    def delete_branch(self, repo: str, branch: str) -> None:
        """Delete a branch. A missing branch is not an error, as the answer to a first attempt may have been lost."""
        with self.explained(repo):
            try:
                self.api.delete_branch(repo, branch=branch)
            except Exception as error:
                cause = cause_of(error)
                if cause is None or status_of(cause) != 404 or branch in self.heads(repo):
                    raise

    def delete_files(self, repo: str, branch: str, head: str, names: Sequence[str]) -> None:
        """Delete files in one commit on ``head``."""
        from huggingface_hub import CommitOperationDelete

        with self.explained(repo):
            self.api.create_commit(
                repo, [CommitOperationDelete(name) for name in names],
                commit_message=f"{branch}: remove {len(names)} files", revision=branch, parent_commit=head,
            )  # fmt: skip

    @contextmanager
    def storage(self, repo: str, branch: str) -> Iterator[None]:
        """Upload with Xet if the hub supports it, else with LFS: the client would use Xet whenever it is installed."""
        from huggingface_hub import constants

        if repo not in self._without_xet:
            self._without_xet[repo] = not self._has_xet(repo, branch)
        if constants.HF_HUB_DISABLE_XET or not self._without_xet[repo]:
            yield
            return
        constants.HF_HUB_DISABLE_XET = True
        try:
            yield
        finally:
            constants.HF_HUB_DISABLE_XET = False

    def _has_xet(self, repo: str, branch: str) -> bool:
        from importlib.util import find_spec
        from urllib.parse import quote

        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return True
        with self.explained(repo):
            url = f"{self.api.endpoint}/api/models/{repo}/xet-write-token/{quote(branch, safe='')}"
            response = get_session().get(url, headers=build_hf_headers(token=self.api.token))
        if response.status_code in {404, 405, 410, 501} or "html" in response.headers.get("Content-Type", ""):
            self.reporter.say(f"{repo}: this hub has no Xet storage; uploading by LFS (as with HF_HUB_DISABLE_XET=1)")
            return False
        return True

    @contextmanager
    def explained(self, repo: str) -> Iterator[None]:
        """Context that retries the requests inside, and turns errors of the hub or network into one sentence.

        Raises:
            PushError: with the repo's name.
        """
        try:
            with patient(self.patience):
                yield
        except Exception as raised:
            if (own := own_error(raised)) is not None:
                raise own from None
            if (reason := self.reason(raised, repo)) is not None:
                raise PushError(f"{repo}: {reason}") from None
            raise

    def reason(self, raised: Exception, repo: str) -> str | None:
        """Why a client call failed, in one sentence; None if neither the hub nor the network is the cause."""
        return why(raised, self.api.endpoint, repo)


def why(raised: Exception, endpoint: str, repo: str) -> str | None:
    """See :meth:`Hub.reason`."""
    error = cause_of(raised) if type(raised) is not ValueError else None
    if error is not None:
        return reason_of(error, endpoint, repo)
    reason = malformed(raised)
    return f"{host_of(endpoint)} {reason}" if reason and reason.startswith("answered") else reason


def is_missing(error: Exception) -> bool:
    """Whether an answer means that the repo does not exist, rather than that this account may not see it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if not isinstance(error, RepositoryNotFoundError) or isinstance(error, GatedRepoError):
        return False
    # the client uses the same words for a refused token
    return status_of(error) != 401 or error.response.headers.get("X-Error-Code") == "RepoNotFound"


def host_of(endpoint: str) -> str:
    """A hub's host, without user name and password."""
    return re.sub(r"^\w+://|[^/@]*@", "", endpoint).split("/")[0] or "the hub"


def check_access(endpoint: str) -> None:
    """Check the endpoint and the token, on which every request depends.

    Raises:
        HubInputError: the endpoint is not an address, or the token contains an invalid character.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(r"https?://[!-~]+", endpoint):
        host = shown(host_of(endpoint))
        raise HubInputError(f"{host}: is not an address of a hub; give --endpoint or HF_ENDPOINT as https://{host}")
    token = get_token()
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        place = next(place for place, letter in enumerate(token, 1) if not "!" <= letter <= "~")
        raise HubInputError(
            f"the hub token (HF_TOKEN, or the file of `hf auth login`) has an invalid character at position {place}, "
            "such as a blank or a letter with an accent; copy it again"
        )


def _remote_file(entry: Any) -> RemoteFile:
    """Check a row of a listing. Raises ValueError if it is malformed."""
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    texts = (entry.path, str) , (entry.blob_id, str), (entry.size, int), (sha256, str | None)  # fmt: skip
    if not all(isinstance(value, kind) for value, kind in texts) or isinstance(entry.size, bool):
        raise ValueError(entry.path)
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise ValueError(entry.path)
    return RemoteFile(entry.path, entry.size, entry.blob_id, sha256)
