"""What a check says about a repo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantize.errors import printable

MOST_SHOWN = 500
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
        object.__setattr__(self, "place", printable(self.place)[:MOST_SHOWN])
        object.__setattr__(self, "message", printable(self.message)[:MOST_SHOWN])

    def as_data(self) -> dict[str, Any]:
        """The finding for machines."""
        return asdict(self)


def error(check: str, place: str, message: str) -> Finding:
    return Finding("error", check, place, message)


def warning(check: str, place: str, message: str) -> Finding:
    return Finding("warning", check, place, message)


def note(check: str, place: str, message: str) -> Finding:
    return Finding("note", check, place, message)
