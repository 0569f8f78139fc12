"""``quantize recipes``: the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli.options import table
from quantize.cli.reporting import say


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the shipped recipes; `recipes copy` gives one to edit."""
    if context.invoked_subcommand is None:
        from quantize.recipe.shipped import headline, shipped_recipes

        click.echo(table([[name, headline(path)] for name, path in shipped_recipes().items()]))


@recipes.command()
@click.argument("name")
@click.argument("target", type=click.Path(dir_okay=False), required=False)
@click.option("--force", is_flag=True, help="Overwrite TARGET.")
def copy(name: str, target: str | None, force: bool) -> None:
    """Copy the recipe NAME to TARGET (default: its own name in this folder)."""
    from quantize.errors import RecipeError
    from quantize.files.atomic import write_atomically
    from quantize.recipe.located import read_located
    from quantize.recipe.shipped import find_shipped, shipped_recipes

    source = find_shipped(name)
    if source is None:
        raise RecipeError(f"{name}: no such recipe; there are {', '.join(shipped_recipes())}")
    path = Path(target or source.name)
    if path.exists() and not force:
        raise RecipeError(f"{path}: exists already; give another name, or --force to overwrite it")
    text = source.read_text(encoding="utf-8")
    parent = read_located(source).data.get("extends")
    if isinstance(parent, str) and (source.parent / parent).is_file():
        # beside the copy there is no parent file, but a shipped recipe is also found by its name
        names = {file.resolve(): known for known, file in shipped_recipes().items()}
        text = text.replace(f"extends: {parent}", f"extends: {names[(source.parent / parent).resolve()]}")
    write_atomically(path, text.encode())
    say(f"wrote {path}; set model.source and release.owner in it, then run `quantize plan {path}`")
