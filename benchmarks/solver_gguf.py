"""GGUF levels with error feedback against llama.cpp's own choice of codes and scales: same bytes on disk, side by side.

Divergence is measured on the held-out text and on docstrings, which are of another domain than the calibration text;
the perplexity of each solved file is asked of llama.cpp too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.child import Run, run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Task, Variant
from benchmarks.quality import by_llama_cpp

LEVELS = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "IQ4_NL", "IQ4_XS")
SOLVES = ("llama.cpp", "error_feedback")
SAMPLES, LENGTH = 64, 256
CHECKED = 16  # windows whose perplexity llama.cpp computes too


def compare(task: Task, evaluation: str, folder: Path) -> None:
    """Build the levels both ways, measure both on both texts, write the section."""
    source = Path(task.model["source"])
    built: dict[str, Run] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    texts = {Path(evaluation).name: {"file": str(Path(evaluation).resolve())}, "docstrings": {"preset": "docstrings"}}
    for solve in SOLVES:
        recipe = task.recipe(folder / solve / "recipe.json", [Variant(4, 64, False)])
        data = json.loads(recipe.read_text(encoding="utf-8"))
        data["gguf"] = {"levels": list(LEVELS), "solve": solve}
        data["measure"] = {"samples": SAMPLES, "sequence_length": LENGTH, "max_kl": None, "max_kl_ratio": None}
        dist = ("--dist", str(folder / solve / "dist"), "--device", "cpu")
        for text, dataset in texts.items():
            data["measure"]["dataset"] = dataset
            recipe.write_text(json.dumps(data), encoding="utf-8")
            if solve not in built:
                built[solve] = run("-m", "quantize", "build", str(recipe), *dist, "--no-measure", "--json")
            done = run("-m", "quantize", "measure", str(recipe), *dist, "--only", "gguf/*", "--json")
            found[solve, text] = {row["branch"]: row for row in json.loads(done.output)["branches"]}
            print(f"solver-gguf: {solve} measured on {text}, {done.seconds:.0f} s", flush=True)
    apart, sizes = _apart(folder / "error_feedback", evaluation, folder)
    seconds = {solve: json.loads(done.output)["seconds"] for solve, done in built.items()}
    rows = [_row(level, found, list(texts), sizes) for level in LEVELS]
    spent, branch = seconds["error_feedback"]["error feedback"], seconds["error_feedback"]["solve"]
    head = ["level", "MB", *(f"{text}: {what}" for text in texts for what in ("KLD", "with feedback", "ratio"))]
    replace_section(
        f"solver-gguf-{source.name}",
        f"""## GGUF with error feedback, {source.name}

`gguf.solve: error_feedback` against llama.cpp's own choice with the same importance matrix: the same types, sizes and
metadata. {task.samples} x {task.length} calibration tokens of {Path(task.calibration).name}; divergence from the source
on {SAMPLES} windows of {LENGTH} tokens, ± its standard error; {machine()}.

{table([*head, "top-1", "with feedback"], rows)}

Error feedback took {spent:.0f} s for all {len(LEVELS)} levels, {spent / len(LEVELS):.1f} s each; one GPTQ branch was
solved in {branch:.1f} s in the same build. llama.cpp loads every file; on {CHECKED} windows its perplexity differs from
ours by at most {apart:.2%}.
""",
    )


def _row(
    level: str, found: dict[tuple[str, str], dict[str, Any]], texts: list[str], sizes: dict[str, str]
) -> list[str]:
    cells = [level]
    for text in texts:
        plain, solved = (found[solve, text][f"gguf/{level}"] for solve in SOLVES)
        if text == texts[0]:
            cells.append(sizes[level])
        cells += [f"{one['kl_divergence']:.5f} ± {one['kl_error']:.5f}" for one in (plain, solved)]
        cells.append(f"{solved['kl_divergence'] / plain['kl_divergence']:.3f}")
    plain, solved = (found[solve, texts[0]][f"gguf/{level}"] for solve in SOLVES)
    return [*cells, f"{plain['top1_agreement']:.1%}", f"{solved['top1_agreement']:.1%}"]


def _apart(solved: Path, evaluation: str, scratch: Path) -> tuple[float, dict[str, str]]:
    """The largest relative difference between our perplexity of a solved file and llama.cpp's, on the same windows; and
    the levels' sizes in MB."""
    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.measuring.text import held_out

    recipe = solved / "recipe.json"
    data = json.loads(recipe.read_text(encoding="utf-8"))
    data["measure"] |= {"samples": CHECKED, "dataset": {"file": str(Path(evaluation).resolve())}}
    recipe.write_text(json.dumps(data), encoding="utf-8")
    dist = solved / "dist"
    done = run("-m", "quantize", "measure", str(recipe), "--dist", str(dist), "--device", "cpu", "--only", "gguf/*",
               "--json")  # fmt: skip
    ours = {row["branch"]: row["perplexity"] for row in json.loads(done.output)["branches"]}
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist))
    text, _ = held_out(plan)
    ids = sample_tokens(text, load_tokenizer(plan.source)).ids
    assert plan.gguf
    apart = [
        abs(by_llama_cpp(item.folder / item.file, ids, scratch) / ours[item.label] - 1) for item in plan.gguf.levels
    ]
    return max(apart), {item.level: f"{item.nbytes / 1e6:.2f}" for item in plan.gguf.levels}
