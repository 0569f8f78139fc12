"""Memory: the plan's peak beside the measured one, and a model of 7B shape within 4 GB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.child import run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Built, Task, Variant
from benchmarks.random_model import SHAPE, text, write_model

BLOCKS = (1, 2, 4)
SAMPLES, LENGTH = 8, 512
LIMIT = "4GB"
MIDDLE: dict[str, Any] = {**SHAPE, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
ONE = [Variant(4, 128, False)]
FOUR = [Variant(4, 128, False), Variant(4, 32, True), Variant(8, 128, True), Variant(8, -1, True)]


def seven(folder: Path) -> None:
    """A random model of 7B shape, one GPTQ branch, ever more blocks."""
    rows, built = [], []
    for count in BLOCKS:
        task = _random(folder / str(count), {**SHAPE, "num_hidden_layers": count, "vocab_size": 32000})
        one = task.build(folder / str(count), ONE, more=("--memory", LIMIT))
        built.append(one)
        planned = _planned(folder / str(count), one, LIMIT)
        stages = [f"{one.stages.get(name, 0):.0f}" for name in ("forward", "statistics", "solve", "write")]
        rows.append([str(count), f"{one.process.seconds:.0f}", *stages, _gb(one.process.peak_bytes), _gb(planned)])
        print(rows[-1], flush=True)
    each = (built[-1].process.seconds - built[0].process.seconds) / (BLOCKS[-1] - BLOCKS[0])
    peaks = [one.process.peak_bytes for one in built]
    replace_section(
        "seven",
        f"""## A model of 7B shape within {LIMIT}

Llama, width {SHAPE["hidden_size"]}, {SHAPE["intermediate_size"]} inside, 32000 tokens of vocabulary, random bfloat16
weights; GPTQ 4 bits 128g, {SAMPLES} x {LENGTH} tokens, computed in float32 with `--memory {LIMIT}`; {machine()}.

{table(["blocks", "wall s", "forward", "statistics", "solve", "write", "peak RSS", "planned"], rows)}

A block takes {each:.0f} s; from {BLOCKS[0]} to {BLOCKS[-1]} blocks the peak grows {max(peaks) / min(peaks):.2f}-fold.
""",
    )


def planned(demo: Task, small: Task | None, folder: Path) -> None:
    """The plan's peak beside the measured one over shapes, methods and budgets."""
    middle = _random(folder / "middle", {**MIDDLE, "vocab_size": 32000})
    wide = _random(folder / "wide", {**SHAPE, "num_hidden_layers": 1, "vocab_size": 32000})
    awq = [{"group_size": 64}]
    cases: list[tuple[str, Task, list[Variant], dict[str, Any], str | None]] = [
        ("SmolLM2, 1 branch", demo, [Variant(4, 64, False)], {}, None),
        ("SmolLM2, 2 branches and AWQ", demo, [Variant(4, 64, True), *FOUR[3:]], {"awq": awq}, None),
        ("SmolLM2, a stream of its own", demo, [Variant(4, 64, True)], {"propagate": "quantized"}, None),
        ("width 2048, 1 branch", middle, ONE, {}, None),
        ("width 2048, 4 branches and AWQ", middle, FOUR, {"awq": [{"group_size": 128}]}, None),
        ("width 2048, 4 branches within 2 GB", middle, FOUR, {}, "2GB"),
        ("width 4096, 1 branch", wide, ONE, {}, None),
    ]
    if small:
        cases.insert(0, ("small model, 1 branch", small, ONE, {}, None))
    rows = []
    for number, (name, task, cells, settings, limit) in enumerate(cases):
        place = folder / str(number)
        built = task.build(place, cells, more=("--memory", limit) if limit else (), **settings)
        wish = _planned(place, built, limit)
        share = wish / built.process.peak_bytes
        rows.append([name, _gb(built.process.peak_bytes), _gb(wish), f"{share - 1:+.0%}"])
        print(rows[-1], flush=True)
    replace_section(
        "memory",
        f"""## Planned and measured memory

Peak resident memory of `quantize build`, a process of its own each, beside what `quantize plan` says; {machine()}.

{table(["build", "measured", "planned", "off by"], rows)}
""",
    )


def _random(folder: Path, shape: dict[str, Any]) -> Task:
    model = write_model(folder / "model", shape, LENGTH)
    corpus = folder / "text.txt"
    corpus.write_text(text(), encoding="utf-8")
    return Task({"source": str(model), "name": "Random"}, str(corpus), SAMPLES, LENGTH)


def _planned(folder: Path, built: Built, limit: str | None) -> int:
    """The planned peak of a recipe of which nothing is built yet."""
    options = ("--memory", limit) if limit else ()
    empty = str(built.dist.with_name("empty"))
    done = run("-m", "quantize", "plan", str(folder / "recipe.json"), "--dist", empty, "--json", *options)
    return int(json.loads(done.output)["peak_bytes"])


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
