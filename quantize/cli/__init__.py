"""The command line: one command a file. It parses, calls and prints; everything heavy is imported on use."""

from __future__ import annotations

import sys

import click

from quantize import __version__
from quantize.cli.ending import run
from quantize.cli.group import Entry, SectionedGroup

SECTIONS = {
    "Make": {
        "recipes": Entry("recipes", "The shipped recipes; `recipes copy` gives one to edit."),
        "validate": Entry("validate", "Check a recipe alone: keys, values, branch names."),
        "plan": Entry("plan", "Every branch with its exact size, time and memory."),
        "build": Entry("build", "Calibrate once, build and measure what is not up to date."),
        "measure": Entry("measure", "Perplexity and KL divergence of what is built."),
        "rebuild": Entry("rebuild", "Repeat a build from its manifests, compare hashes."),
        "engines": Entry("engines", "Other quantizers, run from the same recipe."),
    },
    "Look": {
        "status": Entry("status", "What is built, and its quality."),
        "explain": Entry("explain", "Why a branch is fresh or stale."),
        "report": Entry("report", "The measured quality as one HTML page."),
        "verify": Entry("verify", "Hashes, tensors, and loading in real consumers."),
        "lint": Entry("lint", "Check any quantized repo, whoever made it."),
        "matrix": Entry("matrix", "What is left to build, as a CI matrix."),
    },
    "Publish": {
        "card": Entry("card", "Render the model cards again."),
        "push": Entry("push", "Update the hub to match dist."),
        "diff": Entry("push", "How the hub differs from dist."),
        "git": Entry("git", "The release as bare git repos with LFS."),
    },
    "Tidy": {
        "prune": Entry("prune", "Remove branches that are no longer in the recipe."),
        "clean": Entry("clean", "Remove unfinished builds from a dist."),
        "gc": Entry("clean", "Free space in the cache."),
    },
}


@click.group(
    cls=SectionedGroup, sections=SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
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
      0 done    1 failed at run time    2 the recipe, an argument or the source is wrong
      3 a check's answer is no    130, 143 stopped by Ctrl-C, by SIGTERM
    """


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed at run time, 2 wrong input, 3 a check's answer is no."""
    sys.exit(run(quantize))
