"""Measured quality of a release, from its manifests: points, their Pareto front, the recommended variant."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.planning.plan import Plan

NAMES = {"gptq": "GPTQ", "awq": "AWQ", "gguf": "GGUF"}


@dataclass(frozen=True)
class Point:
    """A measured variant.

    Attributes:
        label: such as ``gptq/main``. method, name: ``gptq`` and ``main``; for GGUF the name is the level.
        nbytes: size of its weights. quality: its entry in the manifest.
    """

    label: str
    method: str
    name: str
    nbytes: int
    quality: Mapping[str, Any]

    @property
    def kl_divergence(self) -> float:
        """In nats; infinite where the variant's outputs are not finite."""
        value = self.quality["kl_divergence"]
        return math.inf if value is None else float(value)

    @property
    def title(self) -> str:
        """Its name for readers."""
        return f"{NAMES[self.method]} {self.name}"


def measured(plan: Plan) -> list[Point]:
    """The measured variants of a release; only those measured on the most common text."""
    points = []
    for item in plan.everything:
        found = plan.finished(item)
        quality = found.get("quality")
        if quality and item.nbytes:  # without llama.cpp a level's size is unknown
            name = item.branch
            points.append(Point(item.label, item.method, name, item.nbytes, quality))
    keys = [point.quality["key"] for point in points]
    common = max(keys, key=keys.count, default=None)
    return [point for point in points if point.quality["key"] == common]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points not beaten by another in both size and divergence, smallest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.nbytes, point.kl_divergence)):
        if not front or point.kl_divergence < front[-1].kl_divergence:
            front.append(point)
    return front


def recommended(points: Sequence[Point]) -> Point | None:
    """The knee of the front: the point nearest to both smallest size and smallest divergence, on logarithmic scales."""
    front = pareto_front(points)
    if not front:
        return None
    sizes = [math.log(point.nbytes) for point in front]
    losses = [math.log(max(point.kl_divergence, 1e-9)) for point in front]

    def distance(index: int) -> float:
        return math.hypot(_share(sizes, index), _share(losses, index))

    return front[min(range(len(front)), key=distance)]


def recommendation(points: Sequence[Point]) -> str | None:
    """The recommendation as one sentence, from the data alone."""
    best = recommended(points)
    if best is None:
        return None
    front = pareto_front(points)
    sentence = (
        f"**{best.title}** is the best trade of size for quality here: {best.nbytes / 1e9:.2f} GB, "
        f"{float(best.quality['top1_agreement']):.1%} of its next tokens are the original's"
    )
    nearest, smallest = front[-1], front[0]
    others = []
    if nearest != best:
        others.append(f"nearest to the original is {nearest.title} ({nearest.nbytes / 1e9:.2f} GB)")
    if smallest != best:
        others.append(f"the smallest is {smallest.title} ({smallest.nbytes / 1e9:.2f} GB)")
    return sentence + ("; " + ", ".join(others) if others else "") + "."


def cells(quality: Mapping[str, Any] | None) -> dict[str, str]:
    """A card's columns PPL, KLD and Top-1."""
    if not quality:
        return {"perplexity": "-", "divergence": "-", "top1": "-"}
    forms = {
        "perplexity": ("perplexity", ".3f"),
        "divergence": ("kl_divergence", ".4f"),
        "top1": ("top1_agreement", ".1%"),
    }
    return {
        column: "nan" if quality[name] is None else format(quality[name], form)
        for column, (name, form) in forms.items()
    }


def loads_in(manifest: Mapping[str, Any], file: str | None = None) -> str:
    """A card's column of consumers that loaded a branch or one of its files, as recorded by ``quantize verify``."""
    found = []
    for consumer, outcome in (manifest.get("loads_in") or {}).items():
        name, _, of_file = consumer.partition(": ")
        if outcome == "ok" and (of_file or None) == file:
            found.append(name)
    return ", ".join(found) or "-"


def fit(points: Sequence[Point], unfit: Collection[str]) -> list[Point]:
    """The points that may be drawn and recommended: without those out of bounds, whose labels are ``unfit``."""
    return [point for point in points if point.label not in unfit]


def summary(points: Sequence[Point], unfit: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Data for the text below a card's table; None if nothing was measured.

    Args:
        unfit: why variants are out of bounds, by label; they are neither recommended nor in the picture.
    """
    unfit = unfit or {}
    if not points:
        return None
    first = points[0].quality
    noise = first.get("noise_floor")
    return {
        "text": first["text"],
        "tokens": f"{first['tokens']:,}",
        "length": first["sequence_length"],
        "on_calibration_text": first["on_calibration_text"],
        "perplexity": f"{first['source']['perplexity']:.3f}",
        "error": f"{first['source']['perplexity_error']:.3f}",
        "noise": f"{noise:.1g}" if noise is not None else None,
        "recommendation": recommendation(fit(points, unfit)),
        "alternative": alternative_text(fit(points, unfit)),
        "unfit": [{"label": label, "reason": reason} for label, reason in unfit.items()],
    }


def alternative_text(points: Sequence[Point]) -> str:
    """The picture described in words, as its alternative text."""
    front = ", ".join(f"{point.title} ({point.nbytes / 1e9:.2f} GB, {point.kl_divergence:.4f})" for point in
                      pareto_front(points))  # fmt: skip
    return f"Size against KL divergence of {len(points)} variants; on the front from small to good: {front}"


def _share(values: Sequence[float], index: int) -> float:
    low, high = min(values), max(values)
    return (values[index] - low) / (high - low) if high > low else 0.0
