"""What a check says about a repo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantize.errors import printable, shortened

MOST_SHOWN = 500
MOST_FINDINGS = 100
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that a careful publisher would mend.

    Attributes:
        severity: ``error`` breaks a loader or a licence, ``warning`` will surprise somebody, ``note`` is good to know.
        check: a short name that stays the same between versions.
        place: the file, and the key or tensor in it.
        message: one sentence, with what to do.
    """

    severity: Severity
    check: str
    place: str
    message: str

    def __post_init__(self) -> None:
        # names and values come from somebody's repo: each stays on its line and of a bearable length
        object.__setattr__(self, "place", _bearable(self.place))
        object.__setattr__(self, "message", _bearable(self.message))

    def as_data(self) -> dict[str, Any]:
        """The finding for machines."""
        return asdict(self)


def capped(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first findings of a check that may have any number of them, then one that counts the rest."""
    last, rest = None, 0
    for number, last in enumerate(findings):
        if number < MOST_FINDINGS:
            yield last
        else:
            rest += 1
    if last is not None and rest:
        yield Finding(last.severity, last.check, "*", f"the same of {rest:,} more")


def _bearable(text: str) -> str:
    return shortened(printable(shortened(text, MOST_SHOWN)), MOST_SHOWN)


def error(check: str, place: str, message: str) -> Finding:
    return Finding("error", check, place, message)


def warning(check: str, place: str, message: str) -> Finding:
    return Finding("warning", check, place, message)


def note(check: str, place: str, message: str) -> Finding:
    return Finding("note", check, place, message)
