"""``quantize explain``: why a branch is stale, and what its key is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantize.cli.options import dist_option, json_option, only_option, print_json, recipe_options
from quantize.cli.reporting import reporter


@click.command()
@recipe_options
@dist_option
@only_option
@json_option
def explain(recipe: str, overrides: tuple[str, ...], dist: Path, only: tuple[str, ...], as_json: bool) -> None:
    """Say for each branch of RECIPE why it is fresh or stale: every input of its key that changed."""
    from quantize.files.digest import key_of
    from quantize.options import Selection
    from quantize.planning.keys import differences
    from quantize.planning.planner import plan_recipe
    from quantize.recipe import load_recipe

    planned = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist, only=only), reporter())
    answers: list[dict[str, Any]] = []
    for item in planned.everything:
        if item.label not in planned.selected:
            continue
        inputs = planned.key_inputs(item)
        known = planned.finished(item)
        changed = differences(known.get("key_inputs") or {}, inputs) if known else []
        answers.append({
            "branch": item.label,
            "state": item.state,
            "why": item.why,
            "key": key_of(inputs),
            "built_key": known.get("key"),
            "changed": changed,
            "made_otherwise": planned.made_otherwise(item),
        })  # fmt: skip
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        click.echo(f"{answer['branch']}: {answer['state']}, {answer['why']}")
        click.echo(f"  key {answer['key'][:16]}, built {(answer['built_key'] or 'never')[:16]}")
        for line in answer["changed"]:
            click.echo(f"  {line}")
        for line in answer["made_otherwise"]:
            click.echo(f"  not in its key: {line}")
