"""``quantize card``: the model cards alone."""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli.options import dist_option, recipe_options
from quantize.cli.reporting import reporter


@click.command()
@recipe_options
@dist_option
@click.option("--print", "method", type=click.Choice(["gptq", "awq", "gguf"]), help="Print one card, write nothing.")
def card(recipe: str, overrides: tuple[str, ...], dist: Path, method: str | None) -> None:
    """Render the model cards of RECIPE again, into the finished branches in dist; nothing else is touched."""
    from quantize.dist.layout import locked
    from quantize.options import Selection
    from quantize.planning.planner import plan_recipe
    from quantize.publishing.card import refresh_cards, render
    from quantize.publishing.finished import check_dist
    from quantize.recipe import load_recipe

    plan = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist), reporter())
    if method:
        click.echo(render(plan, method), nl=False)
        return
    check_dist(plan, reporter())
    with locked(plan.dist, create=False) as held:
        for path in refresh_cards(plan, held):
            click.echo(f"wrote  {path}")
