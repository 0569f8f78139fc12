"""Errors of a hub or the network as one sentence with advice, without addresses, tokens or control characters."""

from __future__ import annotations

import json
import re

from quantize.errors import QuantizeError, printable

MOST_TEXT = 300
"""Characters of the server's message that are shown."""
GAVE_UP = "gave_up"
"""Attribute that marks an error as final, after all attempts."""
PASSING = frozenset({"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"})
SECRETS = re.compile(r"hf_[A-Za-z0-9]+|(?i:bearer)\s+\S+|(?i:https?)://\S+")
NOT_DATA = "answered with a web page instead of data; is a proxy or a login page in between, or is it no hub?"
NOT_THE_API = "answered with other data than the hub's API gives; is it the right endpoint?"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, RecursionError)
"""Errors that the client raises if an answer does not have the API's form."""


class Unanswered(ConnectionError):
    """No answer after all attempts; its cause is the network's error."""


class AskedToWait(ConnectionError):
    """The hub asks for a wait of ``seconds``, which is too long for a command."""

    def __init__(self, seconds: float, until: str) -> None:
        super().__init__(f"asked to wait {seconds:.0f} s")
        self.seconds, self.until = seconds, until


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer, if there was one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def own_error(error: BaseException | None) -> QuantizeError | None:
    """One of our own errors, raised below the client and wrapped by it."""
    while error is not None and not isinstance(error, QuantizeError):
        error = error.__cause__
    return error


def cause_of(error: BaseException | None) -> Exception | None:
    """The HTTP or network error behind an error that the client may have wrapped; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, Exception) and (isinstance(error, HfHubHTTPError | OSError) or is_network(error)):
            return error
        error = error.__cause__
    return None


def is_network(error: BaseException) -> bool:
    """Whether an error comes from the HTTP library below the hub client, whose names vary between versions."""
    return type(error).__module__.split(".")[0].rstrip("2") in {"httpx", "httpcore", "requests", "urllib3"}


def is_interrupted(error: BaseException) -> bool:
    """Whether the network failed in a way that may pass."""
    return is_network(error) and any(kind.__name__ in PASSING for kind in type(error).__mro__)


def is_passing_status(status: int) -> bool:
    """Whether a retry may succeed after this status: too many requests, or a server error."""
    return status in {408, 425, 429} or status >= 500


def is_passing(error: Exception) -> bool:
    """Whether a retry may succeed: no answer, too many requests, a conflict, or a server error."""
    if getattr(error, GAVE_UP, False) or isinstance(error, AskedToWait):
        return False
    status = status_of(error)
    if status is None:
        return isinstance(error, Unanswered) or is_interrupted(error)
    return status in {409, 412} or is_passing_status(status)


def server_text(error: BaseException) -> str:
    """The server's message as one short line without addresses and tokens; empty if there is none."""
    said = getattr(error, "server_message", None)
    if not isinstance(said, str):
        return ""
    return shown(said)


def shown(text: str) -> str:
    """An untrusted text, made safe for a message."""
    line = printable(SECRETS.sub("[...]", " ".join(text[: 20 * MOST_TEXT].split()))).rstrip(" .")
    if line.startswith("<"):
        return ""  # a page, not a sentence
    return line if len(line) <= MOST_TEXT else line[:MOST_TEXT] + " ..."


def reason_of(error: BaseException, endpoint: str | None = None, repo: str | None = None) -> str:
    """Why a request failed, and what to do about it.

    Args:
        endpoint, repo: for the web address that the user may have to visit.
    """
    if isinstance(error, AskedToWait):
        minutes = -(-error.seconds // 60)
        return (
            f"the hub asks to wait {minutes:.0f} minutes, until {error.until}; "
            "run the command again then; what is already uploaded is not sent twice"
        )
    status = status_of(error)
    if status is None:
        return _without_answer(error)
    said = server_text(error)
    told = f": {said}" if said else ""
    method = getattr(getattr(getattr(error, "response", None), "request", None), "method", "")
    kind = type(error).__name__
    if kind == "GatedRepoError":
        where = f"{endpoint}/{repo}" if endpoint and repo else "its page on the hub"
        return f"the repo is gated; accept its terms at {where}, and log in with that account (`hf auth login`)"
    if kind == "DisabledRepoError":
        return f"the hub has disabled the repo{told}"
    if kind == "RevisionNotFoundError":
        return "the repo has no such revision"
    if status == 400:
        return f"the hub refuses what it was sent{told or ' (status 400)'}"
    if status == 401:
        return "the hub does not accept the token; log in with `hf auth login` or set HF_TOKEN"
    if status == 402:
        return f"the hub asks for payment or more storage{told}"
    if status == 403:
        return _forbidden(method, told)
    if status == 404:
        return "no such repo on the hub, or it is private to somebody else" + _beside(said)
    known = {
        409: "something else is being changed there at the same time",
        412: "the branch moved while it was written",
        413: "the hub refuses so large an upload",
        422: "the hub's storage has other bytes than were sent",
        429: "the hub asks to slow down",
        507: "the hub has no storage left for this account",
    }
    return known.get(status, f"the hub answered with status {status}") + (told if status != 429 else "")


def _beside(said: str) -> str:
    plain = {"repository not found", "entry not found", "not found", "reponotfound"}
    return f" ({said})" if said and said.lower() not in plain and not said.lower().startswith("no such") else ""


def _forbidden(method: str, told: str) -> str:
    if method in {"GET", "HEAD"}:
        return f"this account may not read it{told}; use a token that may"
    return f"this account may not write to the repo{told}; use a token with write permission for it"


def _without_answer(error: BaseException) -> str:
    name = type(error).__name__
    if name == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, so the hub is not used"
    if isinstance(error, Unanswered) and error.__cause__ is not None:
        name = type(error.__cause__).__name__
    elif isinstance(error, OSError) and error.strerror and error.filename and not isinstance(error, ConnectionError):
        return f"{error.filename}: {error.strerror}"
    return f"the hub could not be reached ({name})"


def malformed(error: BaseException) -> str | None:
    """The sentence for an answer that the client could not parse; None for other errors."""
    if isinstance(error, json.JSONDecodeError):
        return NOT_DATA
    if not isinstance(error, MALFORMED):
        return None
    text = str(error)
    if text.startswith("Invalid metadata in README.md"):
        told = shown(text.partition("\n")[2].removeprefix("- "))
        return f"the hub refuses the metadata of README.md: {told or 'it does not say why'}; correct it in the recipe"
    if text.startswith("LFS batch API returned errors"):
        told = shown(re.sub(r"Encountered error for file with OID \w+: ", "", text.partition("\n")[2]).strip("`"))
        return f"the hub's storage refuses the files: {told}"
    return NOT_THE_API
