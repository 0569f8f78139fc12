"""``quantize status``: what lies in dist, read from the manifests."""

from __future__ import annotations

from typing import Any

import click

from quantize.cli.options import dist_option, gigabytes, json_option, print_json, recipe_options, say, table


@click.command()
@recipe_options
@dist_option
@json_option
def status(recipe: str, overrides: tuple[str, ...], dist: str, as_json: bool) -> None:
    """Show which branches of RECIPE are built, how well they came out, and what lies beside them in dist."""
    from quantize.formats.manifest import oddities, read_manifest
    from quantize.planning import plan_recipe
    from quantize.recipe import load_recipe

    planned = plan_recipe(load_recipe(recipe, overrides), dist, notify=say)
    report: list[dict[str, Any]] = []
    for item in planned.variants:
        manifest = read_manifest(item.folder) or {}
        ledger = manifest.get("ledger", [])
        errors = [entry["relative_error"] for entry in ledger]
        size = sum(path.stat().st_size for path in item.folder.rglob("*") if path.is_file())
        report.append({
            "branch": item.branch,
            "state": item.state,
            "bytes_on_disk": size,
            "modules": len(ledger),
            "mean_relative_error": sum(errors) / len(errors) if errors else None,
            "oddities": oddities(ledger),
        })  # fmt: skip
    known = {item.branch for item in planned.variants}
    parent = planned.variants[0].folder.parent
    others = sorted(path.name for path in parent.iterdir() if path.name not in known) if parent.is_dir() else []
    if as_json:
        print_json({"repo": planned.repo, "branches": report, "not_in_recipe": others})
        return
    rows = [["branch", "state", "on disk", "modules", "error", "oddities"]]
    for row in report:
        error = row["mean_relative_error"]
        odd = ", ".join(f"{len(modules)} {what}" for what, modules in row["oddities"].items())
        rows.append([
            row["branch"],
            row["state"],
            gigabytes(row["bytes_on_disk"]) if row["modules"] else "-",
            str(row["modules"] or "-"),
            f"{error:.2e}" if error is not None else "-",
            odd,
        ])  # fmt: skip
    click.echo(f"{planned.repo} in {parent}")
    click.echo(table(rows, right=frozenset({2, 3, 4})))
    for name in others:
        click.echo(f"{name}: not in this recipe")
