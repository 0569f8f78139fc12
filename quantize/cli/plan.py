"""``quantize plan``: what a build would do, from the recipe and the model's headers."""

from __future__ import annotations

import sys

import click

from quantize.cli.options import (
    dist_option,
    duration,
    gigabytes,
    json_option,
    only_option,
    print_json,
    recipe_options,
    say,
    table,
)

WORK_IS_LEFT = 2


@click.command()
@recipe_options
@dist_option
@only_option
@json_option
@click.option("--check", is_flag=True, help="Exit with code 2 if a branch is left to build.")
def plan(recipe: str, overrides: tuple[str, ...], dist: str, only: tuple[str, ...], as_json: bool, check: bool) -> None:
    """Show every branch of RECIPE with its exact size, and what a build would cost.

    Reads the model's config and headers only, not its weights.
    """
    from quantize.planning import plan_recipe
    from quantize.recipe import load_recipe

    planned = plan_recipe(load_recipe(recipe, overrides), dist, only, notify=say)
    if as_json:
        print_json(planned.as_data())
    else:
        rows = [["branch", "bits", "group", "act-order", "propagate", "size", "state", "why"]]
        for item in planned.variants:
            variant = item.variant
            rows.append([
                item.branch,
                str(variant.bits),
                str(variant.group_size),
                str(variant.desc_act).lower(),
                variant.propagate,
                gigabytes(item.nbytes),
                item.state if item.branch in planned.selected else "skipped",
                item.why,
            ])  # fmt: skip
        click.echo(f"{planned.repo}: {len(planned.table.linears)} linears in {planned.table.blocks} blocks")
        click.echo(table(rows, right=frozenset({1, 2, 5})))
        if planned.work:
            cost = planned.estimate
            click.echo(
                f"to build: {len(planned.work)} of {len(planned.variants)}, "
                f"about {duration(cost.seconds)} on this machine's CPU, peak memory about {gigabytes(cost.peak_bytes)}"
            )
        else:
            click.echo("nothing to build")
    if check and planned.work:
        sys.exit(WORK_IS_LEFT)
