"""Options and helpers that several commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantize.cli.reporting import is_debugging
from quantize.errors import PlanError

if TYPE_CHECKING:
    from quantize.planning.plan import Plan

Function = TypeVar("Function", bound=Callable[..., Any])

recipe_argument = click.argument("recipe", metavar="RECIPE")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override a key of the recipe, such as gptq.damp_percent=0.01; may be repeated.",
)  # fmt: skip
dist_option = click.option(
    "--dist", default="dist", show_default=True, type=click.Path(file_okay=False, path_type=Path),
    help="Folder that holds the finished branches.",
)  # fmt: skip
only_option = click.option(
    "--only", multiple=True, metavar="PATTERN",
    help="Only branches that match, such as 'gptq-4bit*'; may be repeated.",
)  # fmt: skip
endpoint_option = click.option(
    "--endpoint", help="Address of another hub; default is HF_ENDPOINT, else the hub itself."
)
json_option = click.option(
    "--json", "as_json", is_flag=True,
    help="Print the result as JSON; progress goes to stderr, one JSON object per line.",
)  # fmt: skip


def recipe_options(function: Function) -> Function:
    """RECIPE and --set."""
    return recipe_argument(set_option(function))


def confirmed(question: str, yes: bool) -> bool:
    """Ask the user to confirm a removal; returns the answer.

    Args:
        yes: already confirmed, with --yes.

    Raises:
        PlanError: there is no terminal to ask on.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise PlanError("there is no terminal to confirm on; add --yes to remove them, or --dry-run to list them")
    return click.confirm(question, default=False, err=True)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def gigabytes(count: float) -> str:
    """Bytes as the hub shows them: decimal, two digits."""
    return f"{count / 1e9:.2f} GB" if count >= 5e6 else f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: list[list[str]], right: frozenset[int] = frozenset()) -> str:
    """Rows as aligned columns; ``right`` are the indices of right-aligned ones."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def made_otherwise(planned: Plan) -> list[str]:
    """What ``fresh`` does not cover: fresh branches that a build here would compute differently, a line each."""
    ways: dict[str, list[str]] = {}
    for item in planned.everything:
        if item.state == "fresh" and (differences := planned.made_otherwise(item)):
            ways.setdefault("; ".join(differences), []).append(item.label)
    return [
        f"fresh, but computed differently than it would be here ({way}): {', '.join(labels[:3])}"
        + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
        for way, labels in ways.items()
    ]


def quiet_libraries() -> None:
    """Silence what libraries say about themselves on import and on load; errors still show."""
    if is_debugging():
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("torchao", "torch.utils._pytree", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
