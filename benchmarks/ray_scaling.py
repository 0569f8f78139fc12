"""How builds scale on a local Ray cluster: several recipes after one another and side by side; one recipe in shards."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.child import Run, run
from benchmarks.curves import text
from benchmarks.document import machine, replace_section, table

RECIPES = 2
WORKERS = (1, 2)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def compare(folder: Path, model: Path | None) -> None:
    """Measure ``model``, or a tiny random one, with one thread a worker."""
    recipes = [_recipe(folder / f"recipe-{number}", model, number) for number in range(RECIPES)]
    start = time.perf_counter()
    after = [_build(recipe, "after") for recipe in recipes]
    in_turn = time.perf_counter() - start
    start = time.perf_counter()
    with ThreadPoolExecutor(RECIPES) as pool:
        list(pool.map(lambda recipe: _build(recipe, "beside"), recipes))
    beside = time.perf_counter() - start
    one = {count: _build(recipes[0], f"workers-{count}", "--ray", "local", "--shards", str(count)) for count in WORKERS}
    rows = [
        [f"{RECIPES} recipes after one another", f"{in_turn:.0f}", "1.00"],
        [f"{RECIPES} recipes side by side", f"{beside:.0f}", f"{in_turn / beside:.2f}"],
        ["one recipe, no Ray", f"{after[0].seconds:.0f}", f"{one[1].seconds / after[0].seconds:.2f}"],
        *(
            [f"one recipe, Ray, {count} shard{'s' if count > 1 else ''}", f"{done.seconds:.0f}",
             f"{one[1].seconds / done.seconds:.2f}"]
            for count, done in one.items()
        ),
    ]  # fmt: skip
    replace_section(
        "ray",
        f"""## On a Ray cluster

{model.name if model else "A tiny random Llama"}, one thread a process, a cluster started for each build on this one
machine ({machine("ray")}). Ratios are to the first row of their kind: recipes after one another, Ray with one shard.

{table(["what", "wall s", "ratio"], rows)}
""",
    )


def _recipe(folder: Path, model: Path | None, seed: int) -> Path:
    from tests.tiny import write_model, write_recipe

    source = model or write_model(folder / "model", num_hidden_layers=8, hidden_size=512, intermediate_size=1408)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text(), encoding="utf-8")
    variants = "  variants: [{bits: 4, group_size: 128}, {bits: 4, group_size: 32, desc_act: true}, {bits: 8}]"
    options = {"dataset": str(folder / "text.txt"), "samples": 32, "sequence_length": 256, "seed": seed}
    return write_recipe(folder / "recipe.yaml", source, variants, **options)


def _build(recipe: Path, dist: str, *options: str) -> Run:
    arguments = ["-m", "quantize", "build", str(recipe), "--dist", str(recipe.with_name(dist)), "--device", "cpu"]
    return run(*arguments, "--no-measure", *options, settings=ONE_THREAD)
