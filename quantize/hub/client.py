"""The hub's client, and its errors as sentences: what push, status, prune and lint share.

The token comes from the ecosystem's places only (``HF_TOKEN``, ``hf auth login``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quantize.errors import PushError


class Hub:
    """A hub's repos.

    Args:
        endpoint: of the hub; None is the ecosystem's default (``HF_ENDPOINT``).
    """

    def __init__(self, endpoint: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        self.api = HfApi(endpoint=endpoint)

    def heads(self, repo: str) -> dict[str, str]:
        """The head commit of every branch; empty where there is no such repo."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self.explained(repo):
            try:
                refs = self.api.list_repo_refs(repo)
            except RepositoryNotFoundError:
                return {}
        return {ref.name: ref.target_commit for ref in refs.branches}

    def files(self, repo: str, revision: str) -> Mapping[str, Any]:
        """Files of a revision by name, each a ``huggingface_hub.RepoFile``."""
        from huggingface_hub import RepoFile

        with self.explained(repo):
            tree = self.api.list_repo_tree(repo, recursive=True, revision=revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    @contextmanager
    def explained(self, repo: str) -> Iterator[None]:
        """Turn what the hub or the network says into one sentence.

        Raises:
            PushError: naming the repo.
        """
        try:
            yield
        except Exception as raised:
            if (error := cause_of(raised)) is not None:
                raise PushError(f"{repo}: {reason_of(error)}") from None
            raise


def status_of(error: Exception) -> int | None:
    """The HTTP status of the hub's answer, where there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def cause_of(error: BaseException | None) -> Exception | None:
    """The hub's answer or the network's failure behind an error, which the client may have wrapped; None if neither."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, Exception) and (isinstance(error, HfHubHTTPError | OSError) or is_network(error)):
            return error
        error = error.__cause__
    return None


def is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed: no answer, too many requests, or the server's own fault."""
    status = status_of(error)
    return status is None or status in {408, 409, 412, 429} or status >= 500


def retry_after(error: Exception) -> float | None:
    """Seconds that the hub asks to wait."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(value) if value.isdigit() else None


def reason_of(error: Exception) -> str:
    """One sentence, without addresses or tokens."""
    status = status_of(error)
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


def is_network(error: Exception) -> bool:
    """Errors of the HTTP library below the hub client, which has changed names between its versions."""
    return type(error).__module__.split(".")[0].rstrip("2") in {"httpx", "httpcore", "requests", "urllib3"}
