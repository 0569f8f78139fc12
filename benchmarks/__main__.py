"""``python -m benchmarks``: measures side by side in this one call and rewrites the sections of docs/benchmarks.md.

Threads are pinned to the cores; times are of whole processes, start-up included.
``python -m benchmarks fuzz`` runs the fuzzers instead.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import (
    architectures,
    archived,
    awq,
    curves,
    engines,
    gguf,
    gpu,
    kills,
    memory,
    peers,
    quality,
    ray_scaling,
    sequential,
    solver,
    solver_gguf,
)
from benchmarks.ours import DEMO, Task, Variant

EIGHT = [Variant(4, 64, False), Variant(4, 32, True), Variant(4, 16, True), Variant(4, 64, True),
         Variant(8, 32, True), Variant(8, 64, True), Variant(8, 64, False), Variant(8, -1, True)]  # fmt: skip
LOW = [Variant(4, 128, False), Variant(4, 32, True), Variant(4, 128, True), Variant(3, 128, False),
       Variant(3, 64, True), Variant(2, 64, False), Variant(2, 32, True), Variant(8, 128, False)]  # fmt: skip
SIXTEEN = [Variant(bits, size, order) for bits in (4, 8) for size in (64, 32, 16, -1) for order in (False, True)]
SOLVER = [Variant(4, 64, False), Variant(4, 32, True), Variant(3, 64, False), Variant(2, 32, False)]
SMOLLM = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Given:
    """What the command line gives.

    Attributes:
        demo, small: the embedded model, and the one that was named. held_out: a text to measure on.
        limit: seconds after which another engine is stopped. kills: builds to kill.
        folder: for everything unfinished.
    """

    demo: Task
    small: Task
    model: Path | None
    held_out: str
    limit: float | None
    kills: int
    folder: Path

    @property
    def name(self) -> str:
        """Of the small model."""
        return f"a small model, {self.model.name}" if self.model else ""


@dataclass(frozen=True)
class Table:
    """A section of the document. needs: the options without which it is skipped."""

    measure: Callable[[Given], object]
    needs: tuple[str, ...] = ()


TEXT, TEXTS, ALL = ("calibration",), ("calibration", "evaluation"), ("calibration", "evaluation", "model")
TABLES = {
    "limit": Table(lambda it: curves.limit(it.folder)),
    "blocks": Table(lambda it: curves.blocks(it.folder)),
    "memory": Table(lambda it: memory.planned(it.demo, it.small if it.model else None, it.folder), TEXT),
    "seven": Table(lambda it: memory.seven(it.folder)),
    "variants": Table(lambda it: curves.variants(it.demo, SIXTEEN, it.folder), TEXT),
    "archived": Table(lambda it: archived.check(it.demo, it.folder), TEXT),
    "sequential": Table(lambda it: sequential.compare(it.small, LOW[:7], it.held_out, it.folder), ALL),
    "low": Table(
        lambda it: peers.compare("low", f"3 and 2 bits on {it.name}", it.small, LOW, it.held_out, it.folder), ALL
    ),
    "kills": Table(lambda it: kills.campaign(it.model, it.kills, it.folder) if it.model else None, ("model",)),
    "gguf": Table(lambda it: gguf.compare(it.folder)),
    "solver-gguf": Table(lambda it: solver_gguf.compare(it.small, it.held_out, it.folder), ALL),
    "engines-small": Table(
        lambda it: engines.compare(
            "engines-small", f"All engines on {it.name}", it.small, it.held_out, True, it.limit, it.folder
        ),
        ALL,
    ),
    "engines": Table(
        lambda it: engines.compare(
            "engines", f"All engines on {SMOLLM}", it.demo, it.held_out, False, it.limit, it.folder
        ),
        TEXTS,
    ),
    "awq-small": Table(
        lambda it: awq.compare(
            "awq-small", f"AWQ on {it.name}, against gptqmodel", it.small, LOW, it.held_out, True, it.folder
        ),
        ALL,
    ),
    "awq": Table(
        lambda it: awq.compare("awq", f"AWQ on {SMOLLM}", it.demo, EIGHT, it.held_out, False, it.folder), TEXTS
    ),
    "awq-peer": Table(
        lambda it: awq.compare(
            "awq-peer", f"AWQ on {SMOLLM} against gptqmodel", it.demo, EIGHT, it.held_out, True, it.folder
        ),
        TEXTS,
    ),
    "quality": Table(
        lambda it: quality.compare(
            "quality", f"Every variant of {SMOLLM}, measured from its own bytes", it.demo, EIGHT, it.held_out, it.folder
        ),
        TEXTS,
    ),
    "eight": Table(
        lambda it: peers.compare("eight", f"The set of eight on {SMOLLM}", it.demo, EIGHT, it.held_out, it.folder),
        TEXTS,
    ),
    "solver-small": Table(
        lambda it: solver.compare(
            "solver-small", f"Steps of the solver on {it.name}", it.small, SOLVER, it.held_out, it.folder
        ),
        ALL,
    ),
    "solver": Table(
        lambda it: solver.compare(
            "solver", f"Steps of the solver on {SMOLLM}", it.demo, SOLVER[:3], it.held_out, it.folder
        ),
        TEXTS,
    ),
    "architectures": Table(lambda it: architectures.run(it.model, it.folder) if it.model else None, ("model",)),
    "gpu": Table(lambda it: gpu.compare(EIGHT, it.folder)),
    "ray": Table(lambda it: ray_scaling.compare(it.folder, it.model)),
}
FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(TABLES)))
@click.option("--calibration", type=FILE, help="Calibration text.")
@click.option("--evaluation", type=FILE, help="Held-out text.")
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A small model; of `architectures` a folder of checkpoints.",
)
@click.option("--samples", default=32, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--kills", "killed", default=40, show_default=True, help="Builds to kill, each way (kills).")
@click.option("--limit", type=float, help="Seconds after which an engine is stopped (engines, engines-small).")
def main(
    names: tuple[str, ...],
    calibration: str | None,
    evaluation: str | None,
    model: Path | None,
    samples: int,
    length: int,
    killed: int,
    limit: float | None,
) -> None:
    """Measure the tables NAMES, or all of them; one whose text or model is not given is skipped, with a word."""
    options = {"calibration": calibration, "evaluation": evaluation, "model": model}
    model = model.resolve() if model else None
    demo = Task(DEMO, calibration or "", samples, length)
    small = Task({"source": str(model)}, calibration or "", samples, length)
    for name in names or TABLES:
        table = TABLES[name]
        if lacking := [f"--{need}" for need in table.needs if not options[need]]:
            click.echo(f"{name}: skipped, it needs {' and '.join(lacking)}", err=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            table.measure(Given(demo, small, model, evaluation or "", limit, killed, Path(scratch)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["fuzz"]:  # measures nothing, and needs nothing that is measured with
        from benchmarks.fuzz import fuzz

        fuzz(sys.argv[2:], prog_name="python -m benchmarks fuzz")
    main()
