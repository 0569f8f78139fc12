"""``quantize measure``: perplexity and KL divergence of finished branches against their source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from quantize.cli.flags import model_options
from quantize.cli.options import (
    json_option,
    print_json,
    quiet_libraries,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter
from quantize.options import MeasureOptions

if TYPE_CHECKING:
    from quantize.measuring import Measured


@click.command()
@recipe_options
@model_options(MeasureOptions)
@json_option
def measure(
    recipe: str,
    overrides: tuple[str, ...],
    options: MeasureOptions,
    as_json: bool,
) -> None:
    """Measure finished branches and levels of RECIPE, as read back from their files, against the source model.

    The text is that of the recipe's `measure:` section (--set measure.dataset=./text.txt). The figures go into the
    manifests and the model cards.
    """
    quiet_libraries()
    from quantize.measuring import measure_recipe
    from quantize.recipe import load_recipe

    found = measure_recipe(load_recipe(recipe, overrides), options, reporter())
    if as_json:
        print_json(found.as_data())
    else:
        show(found)
    found.require_within_bounds()


COLUMNS = {
    "perplexity": ".3f", "perplexity_error": ".3f", "kl_divergence": ".4f", "kl_error": ".4f", "kl_p99": ".3f",
    "top1_agreement": ".1%",
}  # fmt: skip


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    if name not in row:
        return ""
    return "nan" if row[name] is None else format(row[name], form)


def show(found: Measured) -> None:
    """The figures as a table."""
    cells = [["branch", "PPL", "±", "KLD", "±", "99 %", "top-1"]]
    for label, row in found.rows.items():
        cells.append([label, *(_cell(row, name, form) for name, form in COLUMNS.items())])
    click.echo(f"{found.tokens} tokens of {found.text}" + (", the calibration text" * found.on_calibration_text))
    click.echo(table(cells, right=frozenset({1, 2, 3, 4, 5, 6})))
