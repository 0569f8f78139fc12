"""``quantize git``: the release as git repos on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from quantize.cli.options import (
    dist_option,
    gigabytes,
    json_option,
    only_option,
    print_json,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter, say


@click.command()
@recipe_options
@dist_option
@only_option
@click.option(
    "--out", required=True, type=click.Path(file_okay=False),
    help="Folder for the git repos, one bare repo for each format.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write also what is out of the recipe's bounds (measure.max_kl).")
@json_option
def git(
    recipe: str, overrides: tuple[str, ...], *, dist: Path, only: tuple[str, ...], out: str, force: bool, as_json: bool
) -> None:
    """Write the finished branches of RECIPE as git repos with LFS; needs no account.

    Each format is one bare repo below --out, and each variant a branch with its own history. Weights are hard links
    to dist. `git clone --branch NAME` (with git-lfs) checks a variant out, `git push` sends it anywhere.
    """
    from quantize import api
    from quantize.options import Selection
    from quantize.recipe import load_recipe

    loaded, selection = load_recipe(recipe, overrides), Selection(dist=dist, only=only)
    written = api.export_git(loaded, out, selection, reporter(), force=force)
    if as_json:
        print_json([{**asdict(branch), "folder": str(branch.folder)} for branch in written])
        return
    rows = [["repo", "branch", "commit", "state", "in LFS", "bytes"]]
    rows += [
        [str(item.folder), item.branch, item.commit[:12], item.state, str(item.lfs_files), gigabytes(item.lfs_bytes)]
        for item in written
    ]
    click.echo(table(rows, right=frozenset({4, 5})))
    copied = sum(branch.copied for branch in written)
    if copied:
        say(f"{copied} files were copied: {out} is on a different filesystem than {dist}, so they cannot be linked")
