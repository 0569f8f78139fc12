"""``python -m benchmarks fuzz``: the fuzzers of the tests, for as many inputs as are asked for."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from tests.fuzzing.campaign import run_target
from tests.fuzzing.material import make_material
from tests.fuzzing.targets import TARGETS


@click.command()
@click.option("--inputs", default=1000, show_default=True, type=click.IntRange(1), help="Inputs of each target.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same inputs.")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Only this one; may be repeated."
)
def fuzz(inputs: int, seed: int, targets: tuple[str, ...]) -> None:
    """Try mutated inputs on every public door, and say what none may do. Ends with 3 if an input did it."""
    faulty = 0
    with tempfile.TemporaryDirectory() as scratch:
        material = make_material(Path(scratch) / "material")
        for name in targets or TARGETS:
            start = time.perf_counter()
            tally = run_target(name, material, Path(scratch) / name, inputs, seed)
            faulty += tally.faulty
            click.echo(
                f"{name:12} {tally.inputs:7} inputs  {tally.refused:7} refused  {tally.faulty:5} faulty  "
                f"{time.perf_counter() - start:7.1f} s"
            )
            for fault, shown in tally.faults.items():
                click.echo(f"  {fault}\n    {shown[:300]!r}")
    if faulty:
        sys.exit(3)
