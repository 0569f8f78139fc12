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
    from quantize import api
    from quantize.options import Selection
    from quantize.publishing.card import render
    from quantize.recipe import load_recipe

    loaded, selection = load_recipe(recipe, overrides), Selection(dist=dist)
    if method:
        click.echo(render(api.plan(loaded, selection, reporter()), method), nl=False)
        return
    for path in api.render_cards(loaded, selection, reporter()):
        click.echo(f"wrote  {path}")
