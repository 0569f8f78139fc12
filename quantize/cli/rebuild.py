"""``quantize rebuild``: repeat a release from its manifests."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from quantize.cli.flags import model_options
from quantize.cli.options import json_option, print_json, quiet_libraries, table
from quantize.cli.reporting import reporter
from quantize.errors import ANSWER_IS_NO, printable, shortened
from quantize.options import RebuildOptions

LONGEST = 300
"""Characters of a note, whose values come from an untrusted manifest."""


@click.command()
@click.argument("manifest", type=click.Path(exists=True, path_type=Path))
@model_options(RebuildOptions)
@json_option
def rebuild(
    manifest: Path,
    options: RebuildOptions,
    as_json: bool,
) -> None:
    """Repeat the build that MANIFEST describes, and compare every file's hash. Exits with code 3 if one differs.

    MANIFEST is a quantize-manifest.json, or a folder: all manifests below it are built from one calibration pass.
    """
    quiet_libraries()
    from quantize.rebuilding.rebuild import rebuild as repeat

    found = repeat(manifest, options, reporter())
    if as_json:
        print_json([asdict(one) | {"same": one.is_same} for one in found])
    else:
        rows = [["branch", "result", "equal", "differing", "missing"]]
        rows += [
            [
                one.label,
                "same bytes" if one.is_same else "differs",
                str(len(one.equal)),
                ", ".join(one.differing) or "-",
                ", ".join(one.missing) or "-",
            ]
            for one in found
        ]
        click.echo(table(rows, right=frozenset({2})))
        for line in dict.fromkeys(line for one in found for line in one.changed):
            click.echo(f"note   {shortened(printable(line), LONGEST)}")
    if not all(one.is_same for one in found):
        sys.exit(ANSWER_IS_NO)
