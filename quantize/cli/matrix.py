"""``quantize matrix``: the work of a recipe as jobs of a CI matrix."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantize.cli.options import dist_option, only_option, recipe_options
from quantize.cli.reporting import reporter


@click.command()
@recipe_options
@dist_option
@only_option
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Maximum of calibrating jobs.")
def matrix(recipe: str, overrides: tuple[str, ...], dist: Path, only: tuple[str, ...], jobs: int) -> None:
    """Print what is left to build of RECIPE as a CI matrix, one line of JSON.

    Each job runs `quantize build RECIPE` with its own `--only` patterns. One job calibrates once for everything; more
    jobs calibrate once each.
    """
    from quantize.options import Selection
    from quantize.planning.matrix import job_matrix
    from quantize.planning.planner import plan_recipe
    from quantize.recipe import load_recipe

    plan = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist, only=only), reporter())
    click.echo(json.dumps(job_matrix(plan, jobs)))
