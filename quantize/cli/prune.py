"""``quantize prune``: away with what the recipe names no more."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantize.cli.options import (
    dist_option,
    endpoint_option,
    gigabytes,
    json_option,
    print_json,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter, say
from quantize.errors import ReleaseError


@click.command()
@recipe_options
@dist_option
@click.option(
    "--where", type=click.Choice(["all", "dist", "hub"]), default="all", show_default=True,
    help="Where to look: in dist, on the hub, or both.",
)  # fmt: skip
@endpoint_option
@click.option("--keep", multiple=True, metavar="PATTERN", help="Leave branches, levels and files that match alone.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def prune(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    dist: Path,
    where: str,
    endpoint: str | None,
    keep: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove what RECIPE does not name, in dist and on the hub. Asks first.

    That is branches and GGUF levels which quantize built (they carry its manifest) and RECIPE names no more, and files
    on the hub that lie in a branch of RECIPE without being part of it. Other people's branches stay, and every `main`.
    """
    from quantize.hub.client import Hub
    from quantize.options import Selection
    from quantize.planning.planner import plan_recipe
    from quantize.publishing.prune import orphans_in_dist, orphans_on_hub, remove
    from quantize.recipe import load_recipe

    plan = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist), reporter())
    hub = Hub(endpoint, reporter()) if where != "dist" else None
    orphans = [*(orphans_in_dist(plan) if where != "hub" else ()), *(orphans_on_hub(plan, hub) if hub else ())]
    orphans = [orphan for orphan in orphans if not orphan.matches(keep)]
    if as_json:
        print_json([orphan.as_data() for orphan in orphans])
    elif orphans:
        rows = [["where", "repo", "branch", "level or file", "bytes"]]
        rows += [
            [item.where, item.repo, item.branch, item.level or item.file or "", gigabytes(item.nbytes)]
            for item in orphans
        ]
        click.echo(table(rows, right=frozenset({4})))
        for item in orphans:
            for name in item.others:
                click.echo(f"{item.label}: goes with {name}, which quantize did not write")
    else:
        click.echo("nothing to prune")
    if dry_run or not orphans:
        return
    if not yes:
        if not sys.stdin.isatty():
            raise ReleaseError("nobody can be asked here; add --yes to remove them, or --dry-run to see them")
        if not click.confirm(f"Remove these {len(orphans)}?", err=True):
            say("nothing was removed")
            return
    remove(plan, orphans, hub)
    say(f"removed {len(orphans)}, {gigabytes(sum(orphan.nbytes for orphan in orphans))}")
