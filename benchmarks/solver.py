"""What each step of the solver gains: the same branches with damping by rule, signed scales and polish, one by one."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.child import run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Task, Variant

BEFORE = {"damping": "mean", "signed_scales": False, "polish": False, "propagate": "source"}
STEPS = {
    "mean damping, positive scales, no polish": BEFORE,
    "damping by the rule": BEFORE | {"damping": "auto"},
    "and signed scales": BEFORE | {"damping": "auto", "signed_scales": True},
    "and polish (the defaults)": {"propagate": "source"},
}


def compare(name: str, title: str, task: Task, cells: list[Variant], evaluation: str, folder: Path) -> None:
    """Build and measure the branches with each step added, write the section."""
    rows, first = [], {}
    for number, (label, settings) in enumerate(STEPS.items()):
        recipe = task.recipe(folder / f"{number}.json", cells, **settings)
        data = json.loads(recipe.read_text(encoding="utf-8"))
        data["measure"] = {"dataset": {"file": str(Path(evaluation).resolve())}}
        recipe.write_text(json.dumps(data), encoding="utf-8")
        options = ("-m", "quantize", "build", str(recipe), "--dist", str(folder / str(number)), "--device", "cpu")
        built = json.loads(run(*options, "--measure", "--json").output)
        figures = {row["branch"]: row for row in built["quality"]["branches"] if "kl_divergence" in row}
        first = first or figures
        cells_of_row = []
        for cell in cells:
            now, before = figures[f"gptq/{cell.name}"], first[f"gptq/{cell.name}"]
            ratio = now["kl_divergence"] / before["kl_divergence"]
            cells_of_row.append(f"{now['kl_divergence']:.4f} ± {now['kl_error']:.4f} ({ratio:.2f})")
        rows.append([label, *cells_of_row, f"{built['seconds']['solve']:.1f}"])
        print(rows[-1], flush=True)
    heads = [f"{cell.bits} bits, {cell.group_size}{', act-order' if cell.desc_act else ''}" for cell in cells]
    replace_section(
        name,
        f"""## {title}

KL divergence from the source (and its ratio to the first row) on {Path(evaluation).name},
{task.samples} x {task.length} calibration tokens, `propagate: source`, one build a row; {machine()}.

{table(["solver", *heads, "solve s"], rows)}
""",
    )
