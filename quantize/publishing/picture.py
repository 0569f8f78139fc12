"""Size against KL divergence of a release's variants, as SVG and PNG that read on light and on dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from quantize.publishing.quality import NAMES, Point, pareto_front

FILES = ("quality.svg", "quality.png")
INK = "#808693"  # as far from white as from the hub's dark page
COLOURS = {"gptq": "#4a86e8", "awq": "#d9730d", "gguf": "#2f9e63"}
MARKS = {"gptq": "o", "awq": "s", "gguf": "^"}


def draw(points: Sequence[Point]) -> dict[str, bytes]:
    """The picture's files by name; none where there is nothing to show. The same points give the same bytes."""
    if not points:
        return {}
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "quantize", "svg.fonttype": "path", "font.size": 10, "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "savefig.transparent": True, "figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = _figure(points)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return {"quality.svg": svg.getvalue(), "quality.png": png.getvalue()}


def _figure(points: Sequence[Point]) -> Any:
    # the object, not pyplot: no window system, no state that a second picture would inherit
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    front = pareto_front(points)
    axes.plot(
        [point.nbytes / 1e9 for point in front], [point.kl_divergence for point in front],
        linestyle="--", linewidth=1, color=INK, zorder=1, label="front",
    )  # fmt: skip
    for method, colour in COLOURS.items():
        own = [point for point in points if point.method == method]
        if own:
            axes.scatter(
                [point.nbytes / 1e9 for point in own], [point.kl_divergence for point in own],
                color=colour, marker=MARKS[method], s=36, zorder=2, label=NAMES[method],
            )  # fmt: skip
    for number, point in enumerate(front):
        axes.annotate(
            point.name.removeprefix("gptq-").removeprefix("awq-"), (point.nbytes / 1e9, point.kl_divergence),
            xytext=(6, 6 if number % 2 else -12), textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
    if min(point.kl_divergence for point in points) > 0:
        axes.set_yscale("log")
    axes.margins(x=0.1, y=0.1)  # room for the names
    axes.set_xlabel("size of the weights, GB")
    axes.set_ylabel("KL divergence from the original, nats")
    axes.grid(visible=True, color=INK, alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False, labelcolor=INK)
    return figure
