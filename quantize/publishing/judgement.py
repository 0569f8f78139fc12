"""Whether a variant's measured quality is that of a quantized model, or of a broken one.

A good 4-bit variant has a mean KL divergence of some hundredths of a nat from its source, a 2-bit one of up to a few
nats. A broken one (a scale applied twice, a matrix turned round) is out of all proportion to both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quantize.errors import QualityError
from quantize.formats.tensors import DTYPE_BYTES
from quantize.planning.items import PlannedVariant
from quantize.planning.plan import Plan
from quantize.publishing.quality import Point, measured

BOUNDS = ((5.5, 0.5), (3.5, 1.0), (2.7, 2.0), (0.0, 4.0))
"""Bits per weight from which a bound holds, and the mean KL divergence, in nats, above which a variant is broken."""
TIMES = 10.0
"""Above so many times the divergence of a sibling of as many bits or fewer, a variant is broken too..."""
FLOOR = 0.3
"""... if its divergence is above this."""


def verdicts(plan: Plan) -> dict[str, str]:
    """Why a measured variant must be taken for broken, by label; those that are sound are not in it."""
    points = measured(plan)
    bits = _bits(plan)
    asked = plan.recipe.measure.max_kl
    return judged(points, {point.label: bits[point.label] for point in points}, None if asked == "auto" else asked)


def require_sound(plan: Plan) -> None:
    """Raise :class:`QualityError` if a selected, measured variant must be taken for broken."""
    found = {label: why for label, why in verdicts(plan).items() if label in plan.selected}
    if found:
        label, why = next(iter(found.items()))
        more = f"; and {len(found) - 1} more: {', '.join(list(found)[1:])}" if len(found) > 1 else ""
        raise QualityError(
            f"{label}: {why}, so it is not fit for use{more}; the files stay where they are: look at the branch's "
            "manifest, or, if you know why, set measure.max_kl in the recipe"
        )


def judged(points: Sequence[Point], bits: Mapping[str, float], bound: float | None = None) -> dict[str, str]:
    """Why variants are broken, by label.

    Args:
        points: what was measured, all on one text. bits: per weight, by label.
        bound: largest mean KL divergence that is sound; None takes ``BOUNDS`` and compares siblings.
    """
    found = {}
    for point in points:
        if why := _why(point, points, bits, bound):
            found[point.label] = why
    return found


def _why(point: Point, points: Sequence[Point], bits: Mapping[str, float], bound: float | None) -> str:
    divergence, perplexity = point.kl_divergence, float(point.quality["perplexity"])
    if not (math.isfinite(divergence) and math.isfinite(perplexity)):
        return f"its mean KL divergence from the source is {divergence:g} and its perplexity {perplexity:g}"
    most = next(limit for least, limit in BOUNDS if bits[point.label] >= least) if bound is None else bound
    if divergence > most:
        return f"its mean KL divergence from the source is {divergence:.3g} nats, above the bound of {most:g}"
    if bound is not None or divergence <= FLOOR:
        return ""
    for other in points:
        if bits[other.label] <= bits[point.label] and divergence > TIMES * other.kl_divergence:
            return (
                f"its mean KL divergence from the source is {divergence:.3g} nats, more than {TIMES:g} times that of "
                f"{other.label} ({other.kl_divergence:.3g}), which has no more bits"
            )
    return ""


def _bits(plan: Plan) -> dict[str, float]:
    """Bits per weight by label: a variant's width, a level's bytes over the source's weights."""
    weights = sum(spec.nbytes // DTYPE_BYTES[spec.dtype] for spec in plan.source.checkpoint.tensors.values())
    found: dict[str, float] = {}
    for item in plan.everything:
        if isinstance(item, PlannedVariant):
            found[item.label] = float(item.variant.bits)
        else:
            found[item.label] = 8 * (item.nbytes or 0) / max(1, weights)
    return found
