"""``quantize verify``: is a release what it says, and does it load?"""

from __future__ import annotations

import sys

import click

from quantize.cli.options import endpoint_option, json_option, print_json, quiet_libraries, say
from quantize.errors import ANSWER_IS_NO


@click.command()
@click.argument("target", metavar="DIR_OR_REPO")
@click.option("--source", help="The unquantized model, as a recipe's model.source, to compare tensors with.")
@click.option("--load/--no-load", default=True, show_default=True, help="Load it in the consumers installed here.")
@click.option("--download", is_flag=True, help="Fetch a hub repo's branches and check them as folders.")
@endpoint_option
@json_option
def verify(target: str, source: str | None, load: bool, download: bool, endpoint: str | None, as_json: bool) -> None:
    """Verify finished branches: hashes against the manifest, tensors against the source, loading in real consumers.

    DIR_OR_REPO is a branch's folder, a folder of branches as in dist, or a hub repo, of which without --download the
    hashes alone are looked at. What loaded goes into the manifest, and with `quantize card` into the card. Exits with
    code 3 if a check fails, or if every check of a branch was skipped, so that nothing is known of it.
    """
    quiet_libraries()
    from quantize.verifying import verify as check

    verdicts = check(target, source=source, load=load, download=download, endpoint=endpoint, notify=say)
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
