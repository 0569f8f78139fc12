"""``quantize prune``: remove what is no longer in the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from quantize.cli.flags import model_options
from quantize.cli.options import confirmed, gigabytes, json_option, print_json, recipe_options, table
from quantize.cli.reporting import reporter, say
from quantize.options import PruneOptions

if TYPE_CHECKING:
    from quantize.publishing.prune import Orphan


@click.command()
@recipe_options
@model_options(PruneOptions)
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    recipe: str, overrides: tuple[str, ...], *, options: PruneOptions, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove what is no longer in RECIPE, from dist and from the hub. Asks first.

    This covers branches and GGUF levels that quantize built (they carry its manifest) and that are no longer in RECIPE,
    and files on the hub in RECIPE's branches that quantize did not write. Branches that quantize did not build are
    never removed, nor is any `main`.
    """
    from quantize import api
    from quantize.recipe import load_recipe

    def agreed(found: Sequence[Orphan]) -> bool:
        _show(found, as_json)
        if dry_run or not found:
            return False
        if not confirmed(f"Remove these {len(found)}?", yes):
            say("nothing was removed")
            return False
        return True

    removed = api.prune(load_recipe(recipe, overrides), options, reporter(), agreed=agreed)
    if removed:
        say(f"removed {len(removed)}, {gigabytes(sum(orphan.nbytes for orphan in removed))}")


def _show(found: Sequence[Orphan], as_json: bool) -> None:
    if as_json:
        print_json([orphan.as_data() for orphan in found])
        return
    if not found:
        click.echo("nothing to prune")
        return
    rows = [["where", "repo", "branch", "level or file", "bytes"]]
    rows += [
        [item.where, item.repo, item.branch, item.level or item.file or "", gigabytes(item.nbytes)] for item in found
    ]
    click.echo(table(rows, right=frozenset({4})))
    for item in found:
        for name in item.others:
            click.echo(f"{item.label}: {name}, which quantize did not write, is removed with it")
