"""One retry rule for every request of the hub's client, applied in the session that sends all of them.

The client's own rules vary: some requests are never repeated, others after silent waits of any length.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

from quantize.hub.errors import (
    GAVE_UP,
    AskedToWait,
    Unanswered,
    is_interrupted,
    is_passing_status,
    reason_of,
    status_of,
)
from quantize.reporter import SILENT, Reporter

LONGEST = 300.0
"""Longest wait, in seconds, that a command accepts from the hub; for a longer one it stops and says until when."""
COMMIT = re.compile(r"/api/\w+/[^/]+/[^/]+/commit/")
"""A commit whose answer was lost may have succeeded, so only a caller that checks may repeat it."""


def sleep(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


@dataclass
class Patience:
    """How often to try, and how long to wait between attempts.

    Attributes:
        attempts: number for one request. first_wait: seconds before the second; doubled for each further one.
        pause: sleeps; tests pass one that returns at once.
    """

    reporter: Reporter = SILENT
    pause: Callable[[float], None] = sleep
    attempts: int = 3
    first_wait: float = 1.0

    def wait(self, error: Exception, attempt: int, reason: str | None = None) -> None:
        """Wait before the next attempt, as long as the hub asks, and report it.

        Raises:
            AskedToWait: the hub asks for more than :data:`LONGEST` seconds.
        """
        headers = getattr(getattr(error, "response", None), "headers", {})
        asked = asked_wait(headers, rate_limited=status_of(error) == 429)
        seconds = self.first_wait * 2 ** (attempt - 1) if asked is None else asked
        if seconds > LONGEST:
            until = datetime.now(UTC) + timedelta(seconds=seconds)
            raise AskedToWait(seconds, f"{until:%Y-%m-%d %H:%M} UTC") from error
        self.reporter.say(f"waiting {seconds:.3g} s, then trying again ({reason or reason_of(error)})")
        self.pause(seconds)

    def send(self, plain: Callable[..., Any], request: Any, **options: Any) -> Any:
        """Send a request with ``plain``, and retry if that may help.

        Raises:
            HfHubHTTPError: the last answer was a temporary fault. Unanswered: there was no answer.
            AskedToWait: the hub asks for too long a wait.
        """
        body = getattr(request.stream, "_stream", None)
        body = None if isinstance(body, bytes) else body
        start = body.tell() if body is not None and hasattr(body, "tell") else None
        for attempt in count(1):
            error = _failure(plain, request, options)
            if not isinstance(error, Exception):
                return error
            if COMMIT.search(request.url.path):
                raise error
            if body is not None and start is None:
                raise error  # a streamed body cannot be sent twice
            if attempt == self.attempts:
                setattr(error, GAVE_UP, True)
                raise error
            self.wait(error, attempt)
            if start is not None and body is not None:
                body.seek(start)
        raise AssertionError("the loop does not end")


def _failure(plain: Callable[..., Any], request: Any, options: Mapping[str, Any]) -> Any:
    """The answer to a request, or the error after which it may be sent again."""
    from huggingface_hub import hf_raise_for_status
    from huggingface_hub.errors import HfHubHTTPError

    try:
        response = plain(request, **options)
    except Exception as error:
        if not is_interrupted(error):
            raise
        unanswered = Unanswered(str(error))
        unanswered.__cause__ = error
        return unanswered
    if not is_passing_status(response.status_code):
        return response
    try:
        response.read()
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        return error
    except Exception as error:  # the error's text was truncated, or has an unknown form
        return HfHubHTTPError(type(error).__name__, response=response)
    finally:
        response.close()
    return response


def asked_wait(headers: Mapping[str, str], *, rate_limited: bool = False) -> float | None:
    """Seconds to wait from an answer's ``Retry-After`` (seconds or date), else ``RateLimit``; None without either."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return float(max(0, math.ceil((date - datetime.now(UTC)).total_seconds())))
    except (ValueError, TypeError, IndexError, OverflowError):
        pass
    match = re.search(r"\bt\s*=\s*(\d{1,9})\b", headers.get("RateLimit", "")) if rate_limited else None
    return float(match[1]) if match else None


@contextmanager
def patient(patience: Patience) -> Iterator[None]:
    """Context in which the hub client's shared session sends every request by this rule, also from upload threads."""
    from huggingface_hub import get_session

    client = get_session()
    if "send" in vars(client):  # an outer context is active
        yield
        return
    plain = client.send

    def send(request: Any, **options: Any) -> Any:
        return patience.send(plain, request, **options)

    client.send = send  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(client).pop("send", None)
