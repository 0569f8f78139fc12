"""``quantize lint``: a careful publisher's checks on any quantized repo."""

from __future__ import annotations

import sys
from collections import Counter

import click

from quantize.cli.options import endpoint_option, json_option, print_json
from quantize.cli.reporting import reporter
from quantize.errors import ANSWER_IS_NO


@click.command()
@click.argument("target", metavar="REPO_OR_DIR")
@click.option("--source", help="The unquantized model, a folder or hub id; by default the card's base_model.")
@click.option("--strict", is_flag=True, help="Exit with code 3 on warnings too, not only on errors.")
@endpoint_option
@json_option
def lint(target: str, source: str | None, strict: bool, endpoint: str | None, as_json: bool) -> None:
    """Check a quantized repo: configs, weights, tokenizer, card, licence, sizes.

    REPO_OR_DIR is a branch's folder, a folder of branches as in dist, owner/name or owner/name@branch on the hub.
    Only headers and small files are read. Exits with code 3 if there are errors.
    """
    from quantize.linting import lint as check

    reports = check(target, source=source, endpoint=endpoint, reporter=reporter())
    counts: Counter[str] = Counter(finding.severity for report in reports for finding in report.findings)
    if as_json:
        print_json([report.as_data() for report in reports])
    else:
        for report in reports:
            click.echo(f"{report.name}" + (f" {report.branch}" if report.branch else "") + f" ({report.kind})")
            for finding in report.findings:
                click.echo(f"  {finding.severity:7}  {finding.place}: {finding.message}  [{finding.check}]")
        summary = ", ".join(f"{counts[name]} {name}s" for name in ("error", "warning", "note"))
        click.echo(f"{len(reports)} branch{'es' if len(reports) != 1 else ''}: {summary}")
    if counts["error"] or (strict and counts["warning"]):
        sys.exit(ANSWER_IS_NO)
