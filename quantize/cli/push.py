"""``quantize push`` and ``quantize diff``: dist and the hub."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantize.cli.flags import model_options
from quantize.cli.options import (
    dist_option,
    endpoint_option,
    gigabytes,
    json_option,
    only_option,
    print_json,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter, say
from quantize.errors import ANSWER_IS_NO
from quantize.options import PushOptions

if TYPE_CHECKING:
    from quantize.publishing.compare import BranchChange


@click.command()
@recipe_options
@dist_option
@only_option
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded and deleted; change nothing.")
@click.option("--check", is_flag=True, help="As --dry-run, and exit with code 3 if anything differs.")
@model_options(PushOptions)
@json_option
def push(
    recipe: str,
    overrides: tuple[str, ...],
    *,
    dist: Path,
    only: tuple[str, ...],
    dry_run: bool,
    check: bool,
    options: PushOptions,
    as_json: bool,
) -> None:
    """Push the finished branches of RECIPE to their hub repos: one commit a branch, `main` last.

    Uploads only what differs, and checks it against the manifest. Files on the hub that quantize did not write stay.
    The token comes from HF_TOKEN or `hf auth login`.
    """
    from quantize import api
    from quantize.options import Selection
    from quantize.recipe import load_recipe

    what = (load_recipe(recipe, overrides), Selection(dist=dist, only=only), options, reporter())
    if dry_run or check:
        changes = api.diff(*what)
        _show(changes, as_json)
        if check and any(change.differs for change in changes):
            sys.exit(ANSWER_IS_NO)
        return
    made = api.push(*what)
    for change in made:
        _name_others(change, say)
    if as_json:
        print_json([change.as_data() for change in made])
        return
    for change in made:
        click.echo(f"pushed  {change.repo} {change.branch}  {gigabytes(change.upload_bytes)}")
    if not made:
        click.echo("nothing to push")


@click.command()
@recipe_options
@dist_option
@only_option
@endpoint_option
@json_option
def diff(
    recipe: str, overrides: tuple[str, ...], *, dist: Path, only: tuple[str, ...], endpoint: str | None, as_json: bool
) -> None:
    """Show how the hub's branches of RECIPE differ from the finished ones in dist."""
    from quantize import api
    from quantize.options import Selection
    from quantize.recipe import load_recipe

    what = (load_recipe(recipe, overrides), Selection(dist=dist, only=only), PushOptions(endpoint=endpoint), reporter())
    _show(api.diff(*what), as_json)


def _show(changes: Sequence[BranchChange], as_json: bool) -> None:
    if as_json:
        print_json([change.as_data() for change in changes])
        return
    rows = [["repo", "branch", "uploads", "bytes", "deletes", "unchanged"]]
    for change in changes:
        size = gigabytes(change.upload_bytes)
        branch = change.branch if change.head else f"{change.branch} (new)"
        rows.append([
            change.repo, branch, str(len(change.uploads)), size, str(len(change.deletes)), str(change.same),
        ])  # fmt: skip
    click.echo(table(rows, right=frozenset({2, 3, 4, 5})))
    for change in changes:
        for name in change.deletes:
            click.echo(f"delete  {change.repo} {change.branch} {name}")
        for name in change.blocked:
            click.echo(
                f"refuse  {change.repo} {change.branch} {name}  (not written by quantize; --overwrite replaces it)"
            )
        for label, reason in change.out_of_bounds.items():
            click.echo(f"refuse  {change.repo} {change.branch} {label}  ({reason}; --force pushes it)")
        _name_others(change, click.echo)


def _name_others(change: BranchChange, tell: Callable[[str], None]) -> None:
    for name in change.cards:
        tell(
            f"stays   {change.repo} {change.branch} {name}  (edited or not by quantize; --overwrite {name} replaces it)"
        )
    for name in change.others:
        tell(f"stays   {change.repo} {change.branch} {name}  (not written by quantize; `quantize prune` removes it)")
