"""How time and memory grow: with the number of variants, with the number of blocks, and under a limit on memory."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.child import run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Built, Task, Variant, stages_table
from benchmarks.random_model import text

ROUNDS = 3
COUNTS = (1, 2, 4, 8, 16)
BLOCKS = (4, 8, 16, 32)
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}


def variants(task: Task, cells: list[Variant], folder: Path) -> None:
    """The same model with ever more branches."""
    rows = [
        (str(count), task.build(folder / str(count), cells[:count], rounds=ROUNDS, propagate="source"))
        for count in COUNTS
    ]
    one, most = rows[0][1].process.seconds, rows[-1][1].process.seconds
    each = (most - one) / (COUNTS[-1] - 1)
    replace_section(
        "variants",
        f"""## What another branch costs

SmolLM2-135M-Instruct, {task.samples} x {task.length} tokens, `propagate: source`; median of {ROUNDS} runs; {machine()}.

{stages_table(rows, "branches")}

The first branch takes {one:.0f} s, every further one {each:.1f} s.
""",
    )


def blocks(folder: Path) -> None:
    """Models of one width and ever more blocks, random weights."""
    rows = []
    for count in BLOCKS:
        rows.append((str(count), _random(folder / str(count), count)))
    times = [built.process.seconds for _, built in rows]
    peaks = [built.process.peak_bytes for _, built in rows]
    a_block = (times[-1] - times[0]) / (BLOCKS[-1] - BLOCKS[0])
    replace_section(
        "blocks",
        f"""## Deeper models

Llama of width {WIDE["hidden_size"]}, random bfloat16 weights, two 4-bit branches, 16 x 256 tokens; {machine()}.

{stages_table(rows, "blocks")}

A block takes {a_block:.2f} s. From {BLOCKS[0]} to {BLOCKS[-1]} blocks the weights grow {BLOCKS[-1] // BLOCKS[0]}-fold,
the peak {peaks[-1] / peaks[0]:.2f}-fold.
""",
    )


def _random(folder: Path, count: int) -> Built:
    model = _write_model(folder, count)
    corpus = folder / "text.txt"
    corpus.write_text(text(), encoding="utf-8")
    task = Task({"source": str(model), "name": "Random"}, str(corpus), 16, 256)
    return task.build(folder, [Variant(4, 128, False), Variant(4, 32, True)], propagate="source")


def _write_model(folder: Path, count: int) -> Path:
    import torch

    from tests.tiny import write_model

    return write_model(folder / "model", dtype=torch.bfloat16, num_hidden_layers=count, **WIDE)


def limit(folder: Path) -> None:
    """A model larger than what the process may allocate."""
    from tests.tiny import write_model, write_recipe

    model = _write_model(folder, BLOCKS[-1])
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    headroom = weights // 2
    variants = "  variants: [{bits: 4, group_size: 128}, {bits: 8}]"
    recipe = write_recipe(folder / "recipe.yaml", model, variants)
    small = write_recipe(folder / "small.yaml", write_model(folder / "small"), variants)
    done = run(
        "-m",
        "tests.limited",
        str(small),
        str(recipe),
        str(folder / "dist"),
        str(headroom),
        str(weights),
        settings={"MALLOC_MMAP_THRESHOLD_": "262144"},
    )
    found = json.loads(done.output.splitlines()[-1])
    rows = [
        ["weights of the model, as stored", f"{weights / 1e6:.0f} MB"],
        ["limit: memory beyond the imported libraries", f"{headroom / 1e6:.0f} MB"],
        ["allocating the weights under this limit", "refused" if found["limit_bites"] else "NOT refused"],
        ["branches built under it", str(len(found["built"]))],
        ["allocated at the end beyond the libraries", f"{(found['after'] - found['before']) / 1e6:.0f} MB"],
        ["wall time", f"{done.seconds:.0f} s"],
    ]
    replace_section(
        "limit",
        f"""## Larger than memory

A random model of {BLOCKS[-1]} blocks, width {WIDE["hidden_size"]}, built by a process whose RLIMIT_DATA is half of its
weights ({machine()}; `tests/limited.py`, and smaller in `tests/test_memory.py`).

{table(["", ""], rows)}
""",
    )
