"""``quantize report``: the release's figures as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli.options import dist_option, recipe_options
from quantize.cli.reporting import reporter


@click.command()
@recipe_options
@dist_option
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="The page's file; by default report.html in dist."
)  # fmt: skip
def report(recipe: str, overrides: tuple[str, ...], dist: Path, out: Path | None) -> None:
    """Write the measured quality of RECIPE as one self-contained HTML page: table, plot, error of every module."""
    from quantize import api
    from quantize.options import Selection
    from quantize.recipe import load_recipe

    path = out or dist / "report.html"
    api.report(load_recipe(recipe, overrides), path, Selection(dist=dist), reporter())
    click.echo(f"wrote  {path}")
