"""``quantize status``: what is in dist, read from the manifests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize.cli.options import (
    dist_option,
    endpoint_option,
    gigabytes,
    json_option,
    made_otherwise,
    print_json,
    recipe_options,
    table,
)
from quantize.cli.reporting import reporter

if TYPE_CHECKING:
    from quantize.planning.plan import Plan


@click.command()
@recipe_options
@dist_option
@click.option("--hub", is_flag=True, help="Also ask the hub which branches are published as they are in dist.")
@endpoint_option
@json_option
def status(
    recipe: str, overrides: tuple[str, ...], *, dist: Path, hub: bool, endpoint: str | None, as_json: bool
) -> None:
    """Show which branches of RECIPE are built, their quality, and what else is in dist."""
    from quantize.dist.ledger import oddities
    from quantize.dist.resume import find_unfinished
    from quantize.files.space import entries
    from quantize.options import Selection
    from quantize.planning.planner import plan_recipe
    from quantize.publishing.bounds import out_of_bounds
    from quantize.recipe import load_recipe

    planned = plan_recipe(load_recipe(recipe, overrides), Selection(dist=dist), reporter())
    there = _published(planned, endpoint) if hub or endpoint else {}
    beyond = out_of_bounds(planned)
    report: list[dict[str, Any]] = []
    for item in planned.everything:
        known = planned.finished(item)
        ledger = known.get("ledger", [])
        errors = [entry["relative_error"] for entry in ledger if entry.get("relative_error") is not None]
        strange = oddities(ledger) | ({"fallback": known["fallbacks"]} if known.get("fallbacks") else {})
        files = [item.folder / name for name in known.get("files", {})]
        size = sum(path.stat().st_size for path in files if path.is_file())
        report.append({
            "branch": item.label,
            "state": item.state,
            "kl_divergence": (known.get("quality") or {}).get("kl_divergence"),
            "out_of_bounds": beyond.get(item.label),
            **({"published": there[item.label]} if there else {}),
            "bytes_on_disk": size,
            "modules": len(ledger) or len(known.get("tensor_types", {})),
            "mean_relative_error": sum(errors) / len(errors) if errors else None,
            "oddities": strange,
            "made_otherwise": planned.made_otherwise(item),
        })  # fmt: skip
    others = _not_in_recipe(planned)
    unfinished = find_unfinished(planned.dist)
    cached: Counter[str] = Counter()
    for entry in entries():
        cached[entry.part] += entry.nbytes
    if as_json:
        print_json({
            "repos": dict(planned.repos),
            "branches": report,
            "not_in_recipe": others,
            "unfinished": [one.as_data() for one in unfinished],
            "cache_bytes": dict(cached),
        })  # fmt: skip
        return
    rows = [["branch", "state", *(["published"] if there else []), "on disk", "modules", "error", "oddities"]]
    for row in report:
        error = row["mean_relative_error"]
        odd = ", ".join(f"{len(modules)} {what}" for what, modules in row["oddities"].items())
        rows.append([
            row["branch"],
            "unfit" if row["out_of_bounds"] else row["state"],
            *([row["published"]] if there else []),
            gigabytes(row["bytes_on_disk"]) if row["modules"] else "-",
            str(row["modules"] or "-"),
            f"{error:.2e}" if error is not None else "-",
            odd,
        ])  # fmt: skip
    click.echo(f"{', '.join(planned.repos.values())} in {dist}")
    click.echo(table(rows, right=frozenset({3, 4, 5} if there else {2, 3, 4})))
    for line in made_otherwise(planned):
        click.echo(line)
    for label, reason in beyond.items():
        click.echo(f"{label}: unfit for use: {reason}; `push` refuses it without --force")
    for name in others:
        click.echo(f"{name}: not in this recipe")
    for one in unfinished:
        click.echo(
            f"unfinished: {one.title}: {one.progress} blocks, {gigabytes(one.nbytes)}; build again to resume, "
            "or remove it with 'quantize clean'"
        )
    if cached:
        sizes = ", ".join(f"{part} {gigabytes(nbytes)}" for part, nbytes in cached.most_common())
        click.echo(f"cache: {sizes}; 'quantize gc' frees what is old")


def _published(planned: Plan, endpoint: str | None) -> dict[str, Any]:
    from quantize.hub.client import Hub
    from quantize.publishing.compare import published

    return dict(published(Hub(endpoint, reporter()), planned))


def _not_in_recipe(planned: Plan) -> list[str]:
    """Folders inside the repos' folders that are not a branch of the recipe."""
    known = {item.folder for item in planned.everything}
    parents = sorted({folder.parent for folder in known})
    return [
        f"{parent.name}/{path.name}"
        for parent in parents
        if parent.is_dir()
        for path in sorted(parent.iterdir())
        if path not in known
    ]
