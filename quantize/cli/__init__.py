"""The command line: one command a file. It parses, calls and prints; everything heavy is imported on use."""

from __future__ import annotations

import sys

import click

from quantize import __version__
from quantize.cli.build import build
from quantize.cli.card import card
from quantize.cli.clean import clean, gc
from quantize.cli.ending import run
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

    \b
    Exit codes:
      0 done    1 something failed while working    2 the recipe, an argument or the source is wrong
      3 the answer of a check is no                 130, 143 stopped by Ctrl-C, by SIGTERM
    """


COMMANDS = (
    recipes, validate, plan, build, measure, report, verify, card, push, diff, git, prune, lint, explain, status,
    matrix, rebuild, engines, clean, gc,
)  # fmt: skip
for command in COMMANDS:
    quantize.add_command(command)


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed while working, 2 wrong input, 3 a check's answer is no."""
    sys.exit(run(quantize))
