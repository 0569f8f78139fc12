"""How each quantized module came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


ORDINARY = frozenset({"solved", "external", "foreign"})
"""Outcomes that nobody needs to be told of; ``foreign`` is what manifests called ``external`` before."""


@dataclass(frozen=True)
class LedgerEntry:
    """One quantized module.

    Attributes:
        outcome: ``solved``, ``damp_raised``, ``rtn_fallback``, ``starved_expert`` (an expert that saw fewer tokens than
            the recipe asks for; one that saw none is rounded to nearest), ``scale_underflow`` or ``scale_overflow``
            (weights that matter need scales smaller or larger than any of float16, and are lost for the most part),
            ``unscaled`` (AWQ, where no operation before the linear can take a scale), or ``external`` (made by another
            engine; only what it reports is known. Older manifests call it ``foreign``).
        damp_percent: the damping that was used. damping: what it is a share of: each channel's ``own`` diagonal, or
            their ``mean``.
        dead_columns: input channels that were zero in every calibration token.
        relative_error: tr((W-Q) H (W-Q)^T) / tr(W H W^T).
        tokens: calibration tokens seen.
        scale_ratio: AWQ: the exponent of the channels' strength that won the search, 0 to 1.
        scale_folded_into: AWQ: the module that is divided by the scale.
        weight_error: ||W-Q||^2 / ||W||^2, where the result of another engine was held against the source.
    """

    module: str
    outcome: str
    damp_percent: float | None = None
    damping: str | None = None
    dead_columns: int | None = None
    relative_error: float | None = None
    tokens: int | None = None
    scale_ratio: float | None = None
    scale_folded_into: str | None = None
    weight_error: float | None = None

    def as_data(self) -> dict[str, Any]:
        """The row, without what does not apply to its method."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def oddities(ledger: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Modules that did not come out as they should, or had dead input channels, by what happened to them."""
    found: dict[str, list[str]] = {}
    for entry in ledger:
        if entry["outcome"] not in ORDINARY:
            found.setdefault(entry["outcome"], []).append(entry["module"])
        if entry.get("dead_columns"):
            found.setdefault("dead_columns", []).append(entry["module"])
    return found
