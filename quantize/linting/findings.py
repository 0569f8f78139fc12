"""The findings of lint checks."""

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
    """Something that a careful publisher would correct.

    Attributes:
        severity: ``error`` breaks a loader or a licence, ``warning`` may surprise users, ``note`` is for information.
        check: a short name, stable across versions.
        place: the file, and the key or tensor in it.
        message: one sentence, with advice.
    """

    severity: Severity
    check: str
    place: str
    message: str

    def __post_init__(self) -> None:
        # names and values are untrusted: keep each on one line, and short
        object.__setattr__(self, "place", _shown(self.place))
        object.__setattr__(self, "message", _shown(self.message))

    def as_data(self) -> dict[str, Any]:
        """The finding as JSON data."""
        return asdict(self)


def capped(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The first findings of a check with any number of them, then one that counts the rest."""
    last, rest = None, 0
    for number, last in enumerate(findings):
        if number < MOST_FINDINGS:
            yield last
        else:
            rest += 1
    if last is not None and rest:
        yield Finding(last.severity, last.check, "*", f"the same of {rest:,} more")


def _shown(text: str) -> str:
    return shortened(printable(shortened(text, MOST_SHOWN)), MOST_SHOWN)


def error(check: str, place: str, message: str) -> Finding:
    return Finding("error", check, place, message)


def warning(check: str, place: str, message: str) -> Finding:
    return Finding("warning", check, place, message)


def note(check: str, place: str, message: str) -> Finding:
    return Finding("note", check, place, message)
