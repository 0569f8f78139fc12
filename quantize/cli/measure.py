"""``quantize measure``: perplexity and KL divergence of finished branches against their source."""

from __future__ import annotations

import click

from quantize.cli.options import (
    dist_option,
    json_option,
    only_option,
    print_json,
    quiet_libraries,
    recipe_options,
    say,
    table,
)


@click.command()
@recipe_options
@dist_option
@only_option
@click.option("--text", "text_file", required=True, type=click.Path(exists=True, dir_okay=False),
              help="Held-out text file to measure on; never the calibration text.")  # fmt: skip
@click.option("--samples", default=16, show_default=True, help="Windows of text.")
@click.option("--length", default=512, show_default=True, help="Tokens of a window.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@json_option
def measure(
    recipe: str,
    overrides: tuple[str, ...],
    dist: str,
    only: tuple[str, ...],
    text_file: str,
    samples: int,
    length: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure finished branches of RECIPE, read back from their own bytes, against the source model."""
    quiet_libraries()
    from quantize.measure import measure_recipe
    from quantize.recipe import load_recipe

    rows = measure_recipe(
        load_recipe(recipe, overrides), dist, only, text_file, samples, length, device=device, notify=say
    )
    if as_json:
        print_json([row.as_data() for row in rows])
        return
    cells = [["branch", "PPL", "±", "KLD", "top-1"]]
    for row in rows:
        cells.append([
            row.branch,
            f"{row.perplexity:.3f}",
            f"{row.perplexity_error:.3f}",
            f"{row.kl_divergence:.4f}",
            f"{row.top1_agreement:.1%}",
        ])  # fmt: skip
    click.echo(table(cells, right=frozenset({1, 2, 3, 4})))
