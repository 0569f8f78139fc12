"""The command line: one command a file. It parses, calls and prints; everything heavy is imported on use."""

from __future__ import annotations

import os
import sys

import click

from quantize import __version__
from quantize.cli.build import build
from quantize.cli.card import card
from quantize.cli.clean import clean, gc
from quantize.cli.engines import engines
from quantize.cli.explain import explain
from quantize.cli.git import git
from quantize.cli.lint import lint
from quantize.cli.matrix import matrix
from quantize.cli.measure import measure
from quantize.cli.plan import plan
from quantize.cli.prune import prune
from quantize.cli.push import diff, push
from quantize.cli.rebuild import rebuild
from quantize.cli.recipes import recipes
from quantize.cli.report import report
from quantize.cli.status import status
from quantize.cli.validate import validate
from quantize.cli.verify import verify
from quantize.errors import QuantizeError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantize")
def quantize() -> None:
    """One recipe turns one causal language model into a complete quantized release.

    \b
    Start here:
      quantize recipes                            the recipes that come with it
      quantize recipes copy gptq-8-branches my.yaml
      quantize plan my.yaml                       every branch with its exact size, time and memory
      quantize build my.yaml                      calibrate once, build every branch into dist/
    """


COMMANDS = (
    recipes, validate, plan, build, measure, report, verify, card, push, diff, git, prune, lint, explain, status,
    matrix, rebuild, engines, clean, gc,
)  # fmt: skip
for command in COMMANDS:
    quantize.add_command(command)


def main() -> None:
    """The console script: a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        sys.exit(quantize.main(standalone_mode=False) or 0)
    except QuantizeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished branches are untouched", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
