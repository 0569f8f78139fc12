"""Bounds on the KL divergence of measured variants: what lies beyond them is damaged, whatever else looks right.

The bounds are loose: they leave room for small models, short texts and few bits, and find what no width explains.
A verdict is a function of the measured figures and the recipe, so a bound may be changed without measuring again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.dist.manifest import read_manifest
from quantize.errors import QualityError, ReleaseError
from quantize.planning.items import PlannedLevel, PlannedVariant
from quantize.planning.plan import Plan
from quantize.recipe.levels import bits_of

MAX_KL = {1: 5.0, 2: 5.0, 3: 2.5, 4: 1.0, 5: 0.5, 6: 0.5, 8: 0.25}
"""Default bound in nats by bits of a weight, ``measure.max_kl: auto``; more bits have the last one."""
RATIO_FLOOR = 0.5
"""Divergence in nats up to which a variant is not compared with others: there, settings explain large ratios."""
MOST_NAMED = 3


@dataclass(frozen=True)
class Figure:
    """A measured variant.

    Attributes:
        bits: nominal bits of a weight. kl_divergence: in nats; NaN or infinite where the variant gives no finite
            output. text: identifies what it was measured on; only figures of one text are compared.
    """

    label: str
    bits: int
    kl_divergence: float
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether a variant's divergence is within bounds.

    Attributes:
        bound: the lowest bound that applies, in nats; None for none. reason: why it is out of bounds; None if it is
            not.
    """

    bound: float | None
    reason: str | None = None

    def as_data(self) -> dict[str, Any]:
        """For the manifest."""
        return {"within_bounds": self.reason is None, "bound": self.bound, "reason": self.reason}


def default_bound(bits: int) -> float:
    """The default bound for a width, in nats."""
    return MAX_KL[max((known for known in MAX_KL if known <= bits), default=min(MAX_KL))]


def judge(
    figures: Sequence[Figure], max_kl: float | Literal["auto"] | None = "auto", max_kl_ratio: float | None = 10.0
) -> dict[str, Verdict]:
    """The verdict on every variant, by label.

    Args:
        max_kl: absolute bound in nats; ``auto`` is by bits, None is no bound.
        max_kl_ratio: bound as a multiple of the worst sound variant with the same or fewer bits, applied above
            :data:`RATIO_FLOOR`; None is no such bound.
    """
    first = {figure.label: _absolute(figure, max_kl) for figure in figures}
    sound = [figure for figure in figures if first[figure.label].reason is None]
    found = {}
    for figure in figures:
        verdict = first[figure.label]
        if verdict.reason is None and max_kl_ratio is not None:
            verdict = _relative(figure, sound, max_kl_ratio, verdict.bound)
        found[figure.label] = verdict
    return found


def _absolute(figure: Figure, max_kl: float | Literal["auto"] | None) -> Verdict:
    bound = default_bound(figure.bits) if max_kl == "auto" else max_kl
    if not math.isfinite(figure.kl_divergence):
        return Verdict(bound, "its outputs are NaN or infinite")
    if bound is not None and figure.kl_divergence > bound:
        whose = f"at {figure.bits} bits" if max_kl == "auto" else "in the recipe"
        return Verdict(
            bound, f"KL divergence {figure.kl_divergence:.4g}, where measure.max_kl is {bound:g} nats {whose}"
        )
    return Verdict(bound)


def _relative(figure: Figure, sound: Sequence[Figure], ratio: float, bound: float | None) -> Verdict:
    others = [
        other
        for other in sound
        if other.label != figure.label and other.text == figure.text and other.bits <= figure.bits
    ]
    # one that is itself above the floor may be damaged in the same way, and excuses this one only if all others are
    calm = [other for other in others if other.kl_divergence <= RATIO_FLOOR]
    worst = max(calm or others, key=lambda other: other.kl_divergence, default=None)
    if worst is None:
        return Verdict(bound)
    own = max(ratio * worst.kl_divergence, RATIO_FLOOR)
    lowest = own if bound is None else min(own, bound)
    if figure.kl_divergence <= own:
        return Verdict(lowest)
    return Verdict(
        lowest,
        f"KL divergence {figure.kl_divergence:.4g}, more than {ratio:g} times (measure.max_kl_ratio) that of "
        f"{worst.label} ({worst.kl_divergence:.4g}), which has {'the same' if worst.bits == figure.bits else 'fewer'} "
        "bits",
    )


def verdicts(plan: Plan) -> dict[str, Verdict]:
    """The verdict on every measured branch and level of a release, by label, from its manifests and recipe."""
    figures = []
    for item in plan.everything:
        quality: Mapping[str, Any] = plan.finished(item).get("quality") or {}
        if quality:
            divergence = quality["kl_divergence"]
            figures.append(
                Figure(item.label, _bits(item), math.nan if divergence is None else divergence, quality["key"])
            )
    asked = plan.recipe.measure
    return judge(figures, asked.max_kl, asked.max_kl_ratio)


def out_of_bounds(plan: Plan, labels: Collection[str] | None = None) -> dict[str, str]:
    """Reason by label of the measured variants that are out of bounds; only of ``labels`` if given."""
    return {
        label: verdict.reason
        for label, verdict in verdicts(plan).items()
        if verdict.reason is not None and (labels is None or label in labels)
    }


def out_of_bounds_in(plan: Plan, folder: Path) -> dict[str, str]:
    """As :func:`out_of_bounds`, of everything that is published with a folder; levels that the recipe no longer has go
    by the verdict in their manifest."""
    here = {item.label for item in plan.everything if item.folder == folder}
    found = out_of_bounds(plan, here)
    for level, entry in ((read_manifest(folder) or {}).get("levels") or {}).items():
        recorded = (entry.get("quality") or {}).get("verdict") or {}
        if f"gguf/{level}" not in here and recorded.get("reason"):
            found[f"gguf/{level}"] = recorded["reason"]
    return found


def require_within_bounds(plan: Plan, labels: Collection[str] | None = None) -> None:
    """Raise :class:`QualityError` if a measured variant of the selection, or of ``labels``, is out of bounds."""
    found = out_of_bounds(plan, plan.selected if labels is None else labels)
    if found:
        raise QualityError(
            f"{named(found)}: built and measured, but not fit for use, and not published without --force; see the "
            "errors by module in `quantize report`, remove the folder and build it again, or raise measure.max_kl or "
            "measure.max_kl_ratio if this is what was wanted"
        )


def refuse_out_of_bounds(plan: Plan, folders: Iterable[Path]) -> None:
    """Raise :class:`ReleaseError` if something that is published with these folders is out of bounds."""
    found = {label: why for folder in folders for label, why in out_of_bounds_in(plan, folder).items()}
    if found:
        raise refusal(found)


def refusal(found: Mapping[str, str]) -> ReleaseError:
    """The error of a publication that holds what is out of bounds."""
    return ReleaseError(
        f"{named(found)}: not published; build it again, leave it out (--only, or for a GGUF level the recipe and "
        "`quantize prune`), or publish it as it is with --force"
    )


def named(found: Mapping[str, str]) -> str:
    """Variants and reasons in one phrase."""
    shown = "; ".join(f"{label} ({reason})" for label, reason in list(found.items())[:MOST_NAMED])
    return shown + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")


def _bits(item: PlannedVariant | PlannedLevel) -> int:
    return bits_of(item.level) if isinstance(item, PlannedLevel) else item.variant.bits
