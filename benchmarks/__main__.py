"""``python -m benchmarks``: measures side by side in this one call and rewrites the sections of docs/benchmarks.md.

Threads are pinned to the cores; times are of whole processes, start-up included.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.ours import DEMO, Task, Variant

EIGHT = [Variant(4, 64, False), Variant(4, 32, True), Variant(4, 16, True), Variant(4, 64, True),
         Variant(8, 32, True), Variant(8, 64, True), Variant(8, 64, False), Variant(8, -1, True)]  # fmt: skip
LOW = [Variant(4, 128, False), Variant(4, 32, True), Variant(4, 128, True), Variant(3, 128, False),
       Variant(3, 64, True), Variant(2, 64, False), Variant(2, 32, True), Variant(8, 128, False)]  # fmt: skip
SIXTEEN = [Variant(bits, size, order) for bits in (4, 8) for size in (64, 32, 16, -1) for order in (False, True)]

NAMES = (
    "limit",
    "blocks",
    "memory",
    "seven",
    "variants",
    "archived",
    "sequential",
    "low",
    "gguf",
    "engines-small",
    "engines",
    "awq-small",
    "awq",
    "awq-peer",
    "quality",
    "eight",
    "gpu",
    "ray",
)
FILE = click.Path(exists=True, dir_okay=False)


@click.command()
@click.argument(
    "names",
    nargs=-1,
    type=click.Choice(NAMES),
)
@click.option("--calibration", type=FILE, help="Calibration text (eight, low, variants, archived).")
@click.option("--evaluation", type=FILE, help="Held-out text (eight, low, sequential).")
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="A small model (low, sequential).")
@click.option("--samples", default=32, show_default=True)
@click.option("--length", default=512, show_default=True)
def main(
    names: tuple[str, ...],
    calibration: str | None,
    evaluation: str | None,
    model: str | None,
    samples: int,
    length: int,
) -> None:
    """Measure the tables NAMES, or all of them; one whose text or model is not given is skipped, with a word."""
    from benchmarks import (
        archived,
        awq,
        curves,
        engines,
        gguf,
        gpu,
        memory,
        peers,
        quality,
        ray_scaling,
        sequential,
    )  # fmt: skip

    demo = Task(DEMO, calibration or "", samples, length)
    small = Task({"source": str(Path(model or "").resolve())}, calibration or "", samples, length)
    needs = {
        "eight": (calibration, evaluation),
        "low": (calibration, evaluation, model),
        "sequential": (calibration, evaluation, model),
        "variants": (calibration,),
        "archived": (calibration,),
        "memory": (calibration,),
        "awq": (calibration, evaluation),
        "engines": (calibration, evaluation),
        "engines-small": (calibration, evaluation, model),
        "awq-peer": (calibration, evaluation),
        "quality": (calibration, evaluation),
        "awq-small": (calibration, evaluation, model),
    }
    for name in names or NAMES:
        if not all(needs.get(name, ())):
            click.echo(f"{name}: skipped, it needs --calibration, --evaluation or --model (see --help)", err=True)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if name == "eight":
                title = "The set of eight on SmolLM2-135M-Instruct"
                peers.compare(name, title, demo, EIGHT, evaluation or "", folder)
            elif name == "low":
                title = f"3 and 2 bits on a small model, {Path(model or '').name}"
                peers.compare(name, title, small, LOW, evaluation or "", folder)
            elif name == "sequential":
                sequential.compare(small, LOW[:7], evaluation or "", folder)
            elif name == "awq":
                awq.compare(name, "AWQ on SmolLM2-135M-Instruct", demo, EIGHT, evaluation or "", False, folder)
            elif name == "awq-peer":
                title = "AWQ on SmolLM2-135M-Instruct against gptqmodel"
                awq.compare(name, title, demo, EIGHT, evaluation or "", True, folder)
            elif name == "awq-small":
                title = f"AWQ on a small model, {Path(model or '').name}, against gptqmodel"
                awq.compare(name, title, small, LOW, evaluation or "", True, folder)
            elif name == "engines":
                engines.compare(name, "All engines on SmolLM2-135M-Instruct", demo, evaluation or "", folder)
            elif name == "engines-small":
                title = f"All engines on a small model, {Path(model or '').name}"
                engines.compare(name, title, small, evaluation or "", folder)
            elif name == "quality":
                title = "Every variant of SmolLM2-135M-Instruct, measured from its own bytes"
                quality.compare(name, title, demo, EIGHT, evaluation or "", folder)
            elif name == "gguf":
                gguf.compare(folder)
            elif name == "gpu":
                gpu.compare(EIGHT, folder)
            elif name == "ray":
                ray_scaling.compare(folder, Path(model).resolve() if model else None)
            elif name == "variants":
                curves.variants(demo, SIXTEEN, folder)
            elif name == "memory":
                memory.planned(demo, small if model else None, folder)
            elif name == "seven":
                memory.seven(folder)
            elif name == "blocks":
                curves.blocks(folder)
            elif name == "limit":
                curves.limit(folder)
            else:
                archived.check(demo, folder)


if __name__ == "__main__":
    main()
