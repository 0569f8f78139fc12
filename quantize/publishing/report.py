"""A release's figures as one HTML page: a sortable table, the picture, and every module's error.

The page loads no other resources. Untrusted text (names, branches) is escaped by the template engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quantize import __version__
from quantize.dist.ledger import ORDINARY
from quantize.planning.items import PlannedVariant
from quantize.planning.plan import Plan
from quantize.publishing.bounds import out_of_bounds
from quantize.publishing.picture import draw
from quantize.publishing.quality import NAMES, Point, fit, measured, pareto_front, summary

FIGURES = (
    "perplexity", "perplexity_error", "kl_divergence", "kl_error", "kl_median", "kl_p99", "top1_agreement",
)  # fmt: skip


def render_report(plan: Plan) -> str:
    """Render the page. Items that are not built or not measured are in the table without figures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    unfit = out_of_bounds(plan)
    points = measured(plan)
    sound = fit(points, unfit)
    environment = Environment(
        loader=PackageLoader("quantize.publishing"), autoescape=select_autoescape(default=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        name=plan.recipe.model.name or plan.source.short_name,
        version=__version__,
        repos=dict(plan.repos),
        rows=_rows(plan, points, unfit),
        picture=(draw(sound) or b"").decode(),
        quality=summary(points, unfit),
        maps=[_heat_map(_map_title(item), plan.finished(item)) for item in plan.variants if plan.finished(item)],
    )


def _map_title(item: PlannedVariant) -> str:
    """Title of an item's heat map. For an external engine's branch only the error of the weights is known."""
    return f"{item.label} ({item.engine.title}: error of the weights)" if item.engine else item.label


def _rows(plan: Plan, points: Sequence[Point], unfit: Mapping[str, str]) -> list[dict[str, Any]]:
    by_label = {point.label: point for point in points}
    front = {point.label for point in pareto_front(fit(points, unfit))}
    rows = []
    for item in plan.everything:
        quality: Mapping[str, Any] = by_label[item.label].quality if item.label in by_label else {}
        rows.append({
            "method": NAMES[item.method],
            "name": item.branch,
            "state": f"unfit: {unfit[item.label]}" if item.label in unfit else item.state,
            "nbytes": item.nbytes,
            "size": f"{item.nbytes / 1e9:.2f} GB",
            "front": item.label in front,
            **{key: quality.get(key) for key in FIGURES},
        })  # fmt: skip
    return rows


def _heat_map(label: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Relative errors of a branch's modules as a grid of blocks (rows) and kinds of linear (columns)."""
    blocks: dict[int, dict[str, Mapping[str, Any]]] = {}
    kinds: list[str] = []
    for entry in manifest.get("ledger", []):
        block, kind = _place(entry["module"])
        if kind not in kinds:
            kinds.append(kind)
        blocks.setdefault(block, {})[kind] = entry
    errors = [_error(entry) for row in blocks.values() for entry in row.values()]
    positive = [math.log10(error) for error in errors if error > 0]
    low, high = min(positive, default=0.0), max(positive, default=1.0)
    grid = []
    for block, row in sorted(blocks.items()):
        grid.append({"block": block, "cells": [_cell(row.get(kind), low, high) for kind in kinds]})
    return {"label": label, "kinds": kinds, "rows": grid}


def _cell(entry: Mapping[str, Any] | None, low: float, high: float) -> dict[str, Any]:
    if entry is None:
        return {"error": None, "share": 0.0, "outcome": ""}
    error = _error(entry)
    share = (math.log10(error) - low) / (high - low) if error > 0 and high > low else 0.0
    odd = entry["outcome"] if entry["outcome"] not in ORDINARY else ""
    if entry.get("dead_columns"):
        odd = f"{odd} {entry['dead_columns']} dead columns".strip()
    return {"error": f"{error:.1e}", "share": round(share, 3), "outcome": odd}


def _error(entry: Mapping[str, Any]) -> float:
    """Relative error of a module's output, or of its weights for an external engine; 0 if neither is known."""
    known = (entry.get(name) for name in ("relative_error", "weight_error"))
    return float(next((error for error in known if error is not None), 0.0))


def _place(module: str) -> tuple[int, str]:
    """Block number and local name of ``model.layers.3.mlp.up_proj``."""
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return (int(parts[number]), ".".join(parts[number + 1 :])) if number is not None else (0, module)
