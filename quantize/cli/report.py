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
    "--out", type=click.Path(dir_okay=False), help="The page's file; by default report.html in dist."
)  # fmt: skip
def report(recipe: str, overrides: tuple[str, ...], dist: Path, out: str | None) -> None:
    """Write the measured quality of RECIPE as one HTML page that needs nothing else: table, plot, errors by module."""
    from quantize.files.atomic import write_atomically
    from quantize.options import Selection
    from quantize.planning.planner import plan_recipe
    from quantize.publishing.report import render_report
    from quantize.recipe import load_recipe

    plan = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist), reporter())
    path = Path(out) if out else Path(dist) / "report.html"
    write_atomically(path, render_report(plan).encode())
    click.echo(f"wrote  {path}")
