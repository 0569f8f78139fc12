"""What may come of an input: success, or one short printable sentence; in little time and memory, with nothing written
outside of its own folder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from quantize.errors import MOST_MESSAGE, QuantizeError
from tests.fuzzing.mutate import LONG

SECONDS = 5.0
"""Of CPU time that an input may take."""
MEMORY = 10**9
"""Bytes of memory that an input may take beyond what the process had."""
QUOTED = 250
"""Characters of one value that a message may quote."""
LONGEST_LINE = 3000
"""Characters of a line of a result; tables show names of files and messages in full."""


class Hang(BaseException):
    """An input took too long."""


class Fault(AssertionError):
    """An input did what none may."""


@dataclass
class Tally:
    """What came of the inputs of one target.

    Attributes:
        reasons: how often each refusal was given, without what is an input's own.
        faults: a line for each kind, and an input that shows it.
    """

    inputs: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    faulty: int = 0

    def add(self, refusal: str, fault: str | None, shown: str) -> None:
        """Note what came of one input."""
        self.inputs += 1
        if refusal:
            self.refused += 1
            self.reasons[re.sub(r"\S*/\S*|\d+|'[^']*'", "*", refusal)[-80:]] += 1
        if fault:
            self.faulty += 1
            self.faults.setdefault(fault, shown)

    @property
    def sameness(self) -> float:
        """The share of the inputs that were refused for the most frequent reason."""
        return max(self.reasons.values(), default=0) / max(1, self.inputs)


def judged(action: Callable[[], Any]) -> tuple[str, str | None]:
    """Run an input: the sentence that refused it, or nothing; and the fault if it did what none may."""
    try:
        with guarded():
            action()
    except QuantizeError as error:
        return str(error), wrong_message(str(error))
    except Fault as error:
        return "", str(error)
    except Hang:
        return "", f"hangs: more than {SECONDS:g} s of CPU time"
    except Exception as error:
        last = [frame for frame in traceback.extract_tb(error.__traceback__) if "/quantize/" in frame.filename][-1:]
        place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
        return "", f"{type(error).__name__}{place}: {str(error)[:100]}"
    return "", None


def wrong_message(message: str) -> str | None:
    """Why a message is not one short printable line."""
    if not message.isprintable():
        return f"a message that is not printable: {message[:80]!r}"
    if len(message) > MOST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:80]}"
    if LONG[:QUOTED] in message:
        return f"a message that quotes more than {QUOTED} characters of a value: {message[:80]}"
    return None if message else "an empty message"


def command(*words: object) -> None:
    """A command in this process. Raises Fault for what its output or exit code may not be."""
    from quantize.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = ["quantize", *map(str, words)]
    with patch.object(sys, "argv", arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    said = [line for line in err.getvalue().splitlines() if line.startswith(("error: ", "Error: "))]
    if code in {1, 2}:
        if len(said) != 1:
            raise Fault(f"exit code {code} with {len(said)} sentences: {err.getvalue()[-200:]!r}")
        raise (
            QuantizeError(said[0][len("error: ") :])
            if wrong_message(said[0][7:]) is None
            else Fault(wrong_message(said[0][7:]))
        )
    if code not in {0, 3}:
        raise Fault(f"exit code {code}")
    for line in out.getvalue().split("\n"):
        if not line.isprintable() and not words[-1:] == ("--json",):
            raise Fault(f"a line that is not printable: {line[:80]!r}")
        if len(line) > LONGEST_LINE:
            raise Fault(f"a line of {len(line)} characters: {line[:80]}")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Limits on CPU time and on memory."""

    def stop(signum: int, frame: object) -> None:
        raise Hang

    handler = signal.signal(signal.SIGPROF, stop)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    used = _allocated()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        if used:
            resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, limits[1]))
        with patch("quantize.cli.supervision.memory_limits", list):  # the limit is ours: no child for it
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _allocated() -> int:
    """Private writable memory of this process, bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
    return 0


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            stat = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (stat.st_size, stat.st_mtime_ns)
    return found
