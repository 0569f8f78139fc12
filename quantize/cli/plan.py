"""``quantize plan``: what a build would do, from the recipe and the model's headers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from quantize.cli.flags import model_options
from quantize.cli.options import (
    duration,
    gigabytes,
    json_option,
    made_otherwise,
    print_json,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter
from quantize.errors import ANSWER_IS_NO
from quantize.options import PlanOptions

if TYPE_CHECKING:
    from quantize.planning.items import PlannedLevel, PlannedVariant
    from quantize.planning.plan import Plan

LEVEL_HEADING = ["file", "size", "fallbacks", "state", "why"]
HEADINGS = {
    "gptq": ["branch", "bits", "group", "act-order", "propagate", "size", "state", "why"],
    "awq": ["branch", "bits", "group", "zero point", "rounding", "size", "state", "why"],
}


@click.command()
@recipe_options
@model_options(PlanOptions)
@json_option
@click.option("--check", is_flag=True, help="Exit with code 3 if a branch is left to build.")
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    options: PlanOptions,
    as_json: bool,
    check: bool,
) -> None:
    """Show every branch of RECIPE with its exact size, and what a build would cost.

    Reads the model's config and headers only, not its weights.
    """
    from quantize.planning.planner import plan_recipe
    from quantize.publishing.bounds import out_of_bounds
    from quantize.recipe import load_recipe

    planned = plan_recipe(load_recipe(recipe, overrides), options, reporter())
    if as_json:
        print_json(planned.as_data())
    else:
        for line in _linears(planned):
            click.echo(line)
        for method in planned.recipe.methods:
            click.echo(f"{planned.repos[method]}:")
            items = planned.of(method)
            rows = [HEADINGS[method], *(_row(planned, item) for item in items)]
            if any(item.engine for item in items):
                titles = [item.engine.title if item.engine else "native" for item in items]
                rows = [[*row[:-2], title, *row[-2:]] for row, title in zip(rows, ["engine", *titles], strict=True)]
            click.echo(table(rows, right=frozenset({1, 2, 5})))
        levels = planned.gguf.levels if planned.gguf else ()
        if planned.gguf:
            click.echo(f"{planned.gguf.repo}:")
            rows = [LEVEL_HEADING, *(_level_row(planned, item) for item in levels)]
            if any(item.feedback for item in levels):
                solved = ["error feedback", *map(_solved, levels)]
                rows = [[*row[:3], cell, *row[3:]] for row, cell in zip(rows, solved, strict=True)]
            click.echo(table(rows, right=frozenset({1, 2})))
            for line in _not_solved(levels):
                click.echo(line)
            for note in planned.gguf.notes:
                click.echo(f"{planned.gguf.repo}: {note}")
        for line in made_otherwise(planned):
            click.echo(line)
        for label, reason in out_of_bounds(planned).items():
            click.echo(f"{label}: unfit for use: {reason}")
        for label, reason in planned.obstacles.items():
            click.echo(f"{label} cannot be built yet: {reason}")
        if refused := sum(item.state == "refused" for item in planned.level_work):
            which = f"{refused} GGUF level{'s' if refused > 1 else ''}"
            click.echo(f"{which} cannot be built; a build of the others needs --only")
        left = len(planned.work) + len(planned.level_work) - refused
        if left:
            cost, by_engines = planned.estimate, len(planned.engine_work)
            line = f"to build: {left} of {len(planned.variants) + len(levels)}"
            if left > by_engines:
                spent = f"about {duration(cost.seconds)} on this machine's CPU"
                line += f", {spent}, peak memory about {gigabytes(cost.peak_bytes)}"
                line += f" (of a GPU's, with --device cuda, {gigabytes(cost.gpu_bytes)})" if cost.gpu_bytes else ""
                if planned.hessians:
                    line += f", {gigabytes(cost.kept_bytes)} of disk until it is done"
            click.echo(line)
            if by_engines:
                click.echo(f"{by_engines} of them by other engines, whose time and memory are not estimated")
        else:
            click.echo("nothing to build")
    if check and (planned.work or planned.level_work):
        sys.exit(ANSWER_IS_NO)


def _linears(planned: Plan) -> list[str]:
    """What is quantized of the model, and what stays, a line for each kind."""
    from quantize.planning.left import grouped

    size = planned.table
    lines = [f"{len(size.linears)} linears in {size.blocks} blocks, {size.share:.1%} of the blocks' weights"]
    for row in grouped(size.left):
        if row["in_blocks"]:
            times = f" ({row['count']} times)" if row["count"] > 1 else ""
            lines.append(f"  in 16 bits: {row['name']}{times}: {row['reason']}")
    return lines + [f"  unchanged, outside the blocks: {name}" for name in size.outside]


def _level_row(planned: Plan, item: PlannedLevel) -> list[str]:
    outcome = item.outcome
    return [
        item.file,
        gigabytes(outcome.nbytes) if outcome else "?",
        f"{len(outcome.fallbacks)} of {len(outcome.types)}" if outcome and outcome.fallbacks else "-",
        item.state if item.label in planned.selected else "skipped",
        item.why,
    ]


def _solved(item: PlannedLevel) -> str:
    """How many of the quantized tensors of a level are solved with error feedback."""
    found = item.feedback
    return f"{len(found.targets)} of {len(found.targets) + len(found.left)}" if found and found.targets else "-"


def _not_solved(levels: Sequence[PlannedLevel]) -> Iterator[str]:
    """Tensors that stay llama.cpp's although the recipe asks for error feedback, a line for each reason."""
    from quantize.planning.feedback import grouped

    reasons: dict[str, dict[str, None]] = {}
    for item in levels:
        for reason, names in grouped(item.feedback.left if item.feedback else {}).items():
            reasons.setdefault(reason, {}).update(dict.fromkeys(names))
    for reason, found in reasons.items():
        shown = ", ".join(list(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        yield f"  llama.cpp's own bytes: {shown}: {reason}"


def _row(planned: Plan, item: PlannedVariant) -> list[str]:
    variant = item.variant
    own = ("desc_act", "propagate") if item.method == "gptq" else ("zero_point", "rounding")
    return [
        item.branch,
        str(variant.bits),
        str(variant.group_size),
        *(str(getattr(variant, name)).lower() for name in own),
        gigabytes(item.nbytes),
        item.state if item.label in planned.selected else "skipped",
        item.why,
    ]
