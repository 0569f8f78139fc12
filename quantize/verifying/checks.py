"""The results of a verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quantize.errors import printable

MOST_SHOWN = 1000
Outcome = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: ``hashes``, ``tensors``, or a consumer such as ``transformers 5.23.0 + gptqmodel 7.6.0``.
        detail: one sentence: what was found, or why it was skipped.
    """

    name: str
    outcome: Outcome
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", printable(self.detail)[:MOST_SHOWN])

    def as_data(self) -> dict[str, Any]:
        """The check as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """All checks of one branch."""

    name: str
    branch: str | None
    checks: tuple[Check, ...]

    @property
    def is_good(self) -> bool:
        """Whether something was checked and nothing failed."""
        outcomes = {check.outcome for check in self.checks}
        return "ok" in outcomes and "failed" not in outcomes

    @property
    def is_empty(self) -> bool:
        """Whether every check was skipped."""
        return {check.outcome for check in self.checks} <= {"skipped"}

    def as_data(self) -> dict[str, Any]:
        """The verdict as JSON data."""
        return {"name": self.name, "branch": self.branch, "checks": [check.as_data() for check in self.checks]}
