"""One rule for trying again, for every request of the hub's client, at the one door that all of them go through.

The client has rules of its own: some requests it never repeats, others it repeats after silent waits of any length.
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
"""Seconds that a command waits at the hub's word; asked for more, it stops and says until when."""
COMMIT = re.compile(r"/api/\w+/[^/]+/[^/]+/commit/")
"""A commit whose answer was lost may have been made, so that only who looks may repeat it."""


def sleep(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


@dataclass
class Patience:
    """How often to try, and how long to wait between.

    Attributes:
        attempts: of one request. first_wait: seconds before the second; doubled for each further one.
        pause: waits; tests pass one that does not.
    """

    reporter: Reporter = SILENT
    pause: Callable[[float], None] = sleep
    attempts: int = 3
    first_wait: float = 1.0

    def wait(self, error: Exception, attempt: int, reason: str | None = None) -> None:
        """Wait before the next attempt, as long as the hub asks, and say so.

        Raises:
            AskedToWait: it asks for more than :data:`LONGEST` seconds.
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
        """Send a request as ``plain`` does, again where that may help.

        Raises:
            HfHubHTTPError: the last answer, where that was a passing fault. Unanswered: there was none.
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
                raise error  # a body that is gone once it is sent
            if attempt == self.attempts:
                setattr(error, GAVE_UP, True)
                raise error
            self.wait(error, attempt)
            if start is not None and body is not None:
                body.seek(start)
        raise AssertionError("the loop does not end")


def _failure(plain: Callable[..., Any], request: Any, options: Mapping[str, Any]) -> Any:
    """The answer to a request, or the error for which it may be sent again."""
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
    except Exception as error:  # the fault's own text was cut off, or is of no known form
        return HfHubHTTPError(type(error).__name__, response=response)
    finally:
        response.close()
    return response


def asked_wait(headers: Mapping[str, str], *, rate_limited: bool = False) -> float | None:
    """Seconds that an answer asks to wait: ``Retry-After`` in seconds or as a date, else ``RateLimit``; None if not."""
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
    """Let the hub client's shared session send every request by this rule, uploads in threads included."""
    from huggingface_hub import get_session

    client = get_session()
    if "send" in vars(client):  # an outer one is at work
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
