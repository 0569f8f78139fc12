"""All variants of all three methods measured from their own bytes, and the figures held against outside ones.

The source's perplexity is computed again by a plain transformers run, each GGUF level's by llama.cpp itself, on the
same windows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import THREADS, run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Task, Variant

LEVELS = "published"


def compare(name: str, title: str, task: Task, cells: list[Variant], evaluation: str, folder: Path) -> None:
    """Build, measure, ask the others, write the section."""
    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.measuring.text import held_out

    recipe = task.recipe(folder / "recipe.json", cells, awq=[{"group_size": 64}])
    data = json.loads(recipe.read_text(encoding="utf-8"))
    data |= {"gguf": {"levels": LEVELS}, "measure": {"dataset": {"file": str(Path(evaluation).resolve())}}}
    recipe.write_text(json.dumps(data), encoding="utf-8")
    dist = folder / "dist"
    options = ("--dist", str(dist), "--device", "cpu")
    built = run("-m", "quantize", "build", str(recipe), *options, "--no-measure", "--json")
    print(f"{name}: build {built.seconds:.0f} s", flush=True)
    done = run("-m", "quantize", "measure", str(recipe), *options, "--json")
    found = json.loads(done.output)
    print(f"{name}: measure {done.seconds:.0f} s", flush=True)

    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist))
    text, _ = held_out(plan)
    ids = sample_tokens(text, load_tokenizer(plan.source)).ids
    rows = {row["branch"]: row for row in found["branches"]}
    outside = {"source": _by_transformers(plan.source.folder, ids)}
    assert plan.gguf
    for item in plan.gguf.levels:
        files = sorted(plan.finished(item)["files"])
        outside[item.label] = by_llama_cpp(item.folder / files[0], ids, folder)
        print(
            f"{name}: {item.label}: {rows[item.label]['perplexity']:.3f}, llama.cpp {outside[item.label]:.3f}",
            flush=True,
        )
    sizes = {item.label: f"{item.nbytes / 1e6:.1f}" for item in plan.everything}
    body = [_row(label, row, sizes.get(label, ""), outside.get(label)) for label, row in rows.items()]
    farthest = max(abs(outside[label] / rows[label]["perplexity"] - 1) for label in outside if label != "source")
    replace_section(
        name,
        f"""## {title}

{len(plan.everything)} variants from one build, {task.samples} x {task.length} calibration tokens; measured on
{found["tokens"]:,} other tokens of {Path(evaluation).name} in windows of {text.sequence_length} by `quantize measure`
in {done.seconds:.0f} s and {done.peak_bytes / 1e9:.2f} GB; {machine()}.
"Outside" is the perplexity of the same windows by plain transformers (source) and by llama.cpp from the file itself,
which rounds activations to 8 bits. The source differs by
{abs(outside["source"] / rows["source"]["perplexity"] - 1):.2%}, the levels by at most {farthest:.2%}.

{table(["variant", "MB", "PPL", "±", "KLD", "±", "KLD 99 %", "top-1", "outside PPL"], body)}
""",
    )


def _row(label: str, row: dict[str, Any], size: str, outside: float | None) -> list[str]:
    figures = [f"{row['perplexity']:.3f}", f"{row['perplexity_error']:.3f}"]
    if "kl_divergence" in row:
        figures += [f"{row['kl_divergence']:.4f}", f"{row['kl_error']:.4f}", f"{row['kl_p99']:.3f}"]
        figures += [f"{row['top1_agreement']:.1%}"]
    else:
        figures += [""] * 4
    return [label, size, *figures, f"{outside:.3f}" if outside else ""]


def _by_transformers(folder: Path, ids: np.ndarray) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    with torch.inference_mode():
        for window in torch.from_numpy(ids)[:, None]:
            chances = model(window).logits[:, :-1].log_softmax(-1)
            losses.append(-chances.gather(-1, window[:, 1:, None]).double())
    return math.exp(float(torch.cat(losses).mean()))


def by_llama_cpp(file: Path, ids: np.ndarray, scratch: Path) -> float:
    """Perplexity of a GGUF file on windows ``ids`` [windows, length], as llama.cpp itself computes it."""
    import torch

    from quantize.files.child import Task as Child
    from quantize.files.child import run_child
    from quantize.gguf import worker_logits
    from quantize.gguf.reasons import QUIET

    losses = []
    arguments = {
        "model": str(file), "ids": str(scratch / "ids.npy"), "logits": str(scratch / "out.npy"),
        "threads": int(THREADS), "text": "",
    }  # fmt: skip
    for window in ids:
        np.save(scratch / "ids.npy", window)
        run_child(Child(Path(worker_logits.__file__), arguments, variables=QUIET))
        logits = torch.from_numpy(np.load(scratch / "out.npy"))[:-1]
        losses.append(-logits.log_softmax(-1).gather(-1, torch.from_numpy(window)[1:, None]).double())
    return math.exp(float(torch.cat(losses).mean()))
