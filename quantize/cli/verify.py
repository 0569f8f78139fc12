"""``quantize verify``: is a release what its manifest says, and does it load?"""

from __future__ import annotations

import sys

import click

from quantize.cli.flags import model_options
from quantize.cli.options import json_option, print_json, quiet_libraries
from quantize.cli.reporting import reporter, say
from quantize.errors import ANSWER_IS_NO
from quantize.options import VerifyOptions


@click.command()
@click.argument("target", metavar="DIR_OR_REPO")
@model_options(VerifyOptions)
@json_option
def verify(target: str, options: VerifyOptions, as_json: bool) -> None:
    """Verify finished branches: hashes against the manifest, tensors against the source, loading in real consumers.

    DIR_OR_REPO is a branch's folder, a folder of branches as in dist, or a hub repo, of which only the hashes are
    checked unless --download is given. The consumers that loaded a branch are recorded in its manifest, and shown in
    the card after `quantize card`. Exits with code 3 if a check fails, or if every check of a branch was skipped.
    """
    quiet_libraries()
    from quantize.verifying import verify as check

    verdicts = check(target, options, reporter())
    if as_json:
        print_json([verdict.as_data() for verdict in verdicts])
    else:
        for verdict in verdicts:
            click.echo(f"{verdict.name}" + (f" {verdict.branch}" if verdict.branch else ""))
            for found in verdict.checks:
                click.echo(f"  {found.outcome:7}  {found.name}: {found.detail}")
    for verdict in verdicts:
        if verdict.is_empty:
            say(f"{verdict.name}" + (f" {verdict.branch}" if verdict.branch else "") + ": every check was skipped")
    if not all(verdict.is_good for verdict in verdicts):
        sys.exit(ANSWER_IS_NO)
