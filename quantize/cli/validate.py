"""``quantize validate``: is the recipe valid, without looking at the model."""

from __future__ import annotations

import click

from quantize.cli.options import json_option, print_json, recipe_options


@click.command()
@recipe_options
@json_option
def validate(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check RECIPE alone: keys, values, branch names. Looks at no model and no network."""
    from quantize.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if as_json:
        print_json(loaded.recipe.model_dump(mode="json"))
        return
    found = loaded.recipe
    counts = [f"{len(found.section(method).variants)} {method.upper()}" for method in found.methods]
    wanted = [f"{' and '.join(counts)} branches"] if counts else []
    wanted += [f"{len(found.gguf.levels)} GGUF levels"] if found.gguf else []
    click.echo(f"{recipe}: valid; {' and '.join(wanted)} of {found.model.source}:")
    for method in found.methods:
        for variant in found.section(method).variants:
            click.echo(f"  {method}/{variant.branch}")
    for level in found.gguf.levels if found.gguf else ():
        click.echo(f"  gguf/{level}")
