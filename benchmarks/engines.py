"""Every engine that runs here behind the same recipe, side by side: one branch each, measured once."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.child import Run, run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Task

GROUP_SIZE = 64
LEFT_OUT = ("awq/auto-round",)
"""The rounding that it learns for AWQ's format is that for GPTQ's."""
SLOW = ("awq/gptqmodel", "gptq/auto-round")
"""Built last, and once in any case."""


def compare(name: str, title: str, task: Task, evaluation: str, twice: bool, limit: float | None, folder: Path) -> None:
    """Build a branch with each engine, or ``twice`` to compare the bytes; measure all, write the section.

    Args:
        limit: seconds after which an engine is stopped; its row then says no more.
    """
    import quantize
    from quantize.engines import known_engines
    from quantize.planning.engines import environment_of

    absent: dict[str, str] = {}
    variants: dict[str, list[dict[str, Any]]] = {"gptq": [{"branch": "native"}], "awq": [{"branch": "native"}]}
    for engine in known_engines().values():
        for method in engine.methods:
            if f"{method}/{engine.name}" in LEFT_OUT:
                continue
            reason = environment_of(engine).obstacle(method)
            if reason:
                absent[engine.name] = reason
            else:
                variants[method].append({"branch": engine.name, "engine": engine.name})
    recipe = task.recipe(folder / "recipe.json", [])
    data = json.loads(recipe.read_text(encoding="utf-8"))
    data |= {method: {"group_size": GROUP_SIZE, "variants": listed} for method, listed in variants.items()}
    data["measure"] = {"dataset": {"file": str(Path(evaluation).resolve())}}
    recipe.write_text(json.dumps(data), encoding="utf-8")

    dist, again = folder / "dist", folder / "again"
    runs: dict[str, Run] = {}
    same: dict[str, str] = {}
    planned = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist)).variants
    for item in sorted(planned, key=lambda item: item.label in SLOW):
        try:
            runs[item.label] = _build(recipe, dist, item.label, limit)
        except TimeoutError as error:
            print(f"{name}: {item.label}: {error}", flush=True)
            continue
        print(f"{name}: {item.label}: {runs[item.label].seconds:.0f} s", flush=True)
        place = item.folder.relative_to(dist)
        if item.label in SLOW or not twice:
            same[item.label] = "not tried"
            continue
        _build(recipe, again, item.label, limit)
        same[item.label] = "yes" if _hashes(dist / place) == _hashes(again / place) else "no"
        shutil.rmtree(again)
    found = json.loads(run("-m", "quantize", "measure", str(recipe), "--dist", str(dist), "--json").output)
    rows = {row["branch"]: row for row in found["branches"]}
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist))
    body = []
    for item in plan.variants:
        made_by = item.engine.title if item.engine else "native"
        if item.label not in runs:
            body.append([item.method.upper(), made_by, f"stopped after {limit:.0f}", *["-"] * 5])
            continue
        row, done = rows[item.label], runs[item.label]
        body.append([
            item.method.upper(), made_by, f"{done.seconds:.0f}",
            f"{done.peak_bytes / 1e9:.2f} GB", f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.4f}",
            f"{item.nbytes / 1e6:.2f} MB", same[item.label],
        ])  # fmt: skip
    missing = "".join(f"\n- {reason}" for reason in dict.fromkeys(absent.values()))
    replace_section(
        name,
        f"""## {title}

4 bits, group_size {GROUP_SIZE}, all else as the recipe and the engines have it; {task.samples} x {task.length}
calibration tokens of {Path(task.calibration).name}, the same ids for all; measured by `quantize measure` on
{found["tokens"]:,} tokens of {Path(evaluation).name}, where the source's perplexity is
{rows["source"]["perplexity"]:.2f}; {machine()}. Seconds and memory are
of the whole `quantize build` with its children, one run. The last column: whether a second build gave the same bytes.

{table(["method", "engine", "seconds", "peak RSS", "PPL", "KLD", "tensors", "bytes again"], body)}
{"Not here:" + chr(10) + missing if missing else ""}
""",
    )


def _build(recipe: Path, dist: Path, label: str, limit: float | None) -> Run:
    options = ("--dist", str(dist), "--only", label, "--device", "cpu", "--no-measure", "--json")
    return run("-m", "quantize", "build", str(recipe), *options, limit=limit)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the card, which tells of all branches."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "README.md"
    }
