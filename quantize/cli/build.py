"""``quantize build``: run the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from quantize.cli.flags import model_options
from quantize.cli.measure import show
from quantize.cli.options import (
    duration,
    gigabytes,
    json_option,
    print_json,
    quiet_libraries,
    recipe_options,
)
from quantize.cli.reporting import reporter, say
from quantize.options import BuildOptions, MeasureOptions

if TYPE_CHECKING:
    from quantize.building import BuildResult
    from quantize.measuring import Measured


@click.command()
@recipe_options
@model_options(BuildOptions)
@click.option(
    "--measure/--no-measure", "measured", default=True, show_default=True,
    help="Measure what was built, for the manifests and the cards.",
)  # fmt: skip
@json_option
def build(
    recipe: str,
    overrides: tuple[str, ...],
    options: BuildOptions,
    measured: bool,
    as_json: bool,
) -> None:
    """Build every branch of RECIPE that is not up to date, all from one calibration pass, and measure it."""
    quiet_libraries()
    from quantize.building import build_recipe
    from quantize.measuring import check_text, measure_recipe
    from quantize.publishing.bounds import require_within_bounds
    from quantize.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    measuring = MeasureOptions(dist=options.dist, only=options.only, device=options.device)
    if measured:
        check_text(loaded, measuring, reporter())
    result = build_recipe(loaded, options, reporter())
    quality = measure_recipe(loaded, measuring, reporter()) if measured else None
    _show(result, quality, as_json)
    require_within_bounds(result.plan)


def _show(result: BuildResult, quality: Measured | None, as_json: bool) -> None:
    if as_json:
        print_json({
            "repos": dict(result.plan.repos),
            "built": result.built,
            "fresh": result.fresh,
            "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
            "oddities": result.oddities,
            "quality": quality.as_data() if quality else None,
        })  # fmt: skip
        return
    levels = result.plan.gguf.levels if result.plan.gguf else ()
    places = [(item.label, item.folder, item.nbytes) for item in result.plan.variants]
    places += [(item.label, item.folder / item.file, item.nbytes) for item in levels]
    for label, place, nbytes in places:
        if label in result.built:
            click.echo(f"built  {place}  {gigabytes(nbytes)}")
        elif label in result.fresh:
            click.echo(f"fresh  {place}  {gigabytes(nbytes)}")
    for label, found in result.oddities.items():
        for what, modules in found.items():
            shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
            click.echo(f"note   {label}: {what} in {shown} (see its manifest)")
    if quality:
        show(quality)
    if result.seconds:
        stages = ", ".join(f"{stage} {duration(value)}" for stage, value in result.seconds.items())
        say(f"{duration(sum(result.seconds.values()))}: {stages}")
