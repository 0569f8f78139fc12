"""Our branches against as many runs of gptqmodel: time, memory, perplexity and KL divergence, branch by branch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.child import Run
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Built, Task, Variant, stages_table

if TYPE_CHECKING:
    from quantize.measuring.quality import Quality, Weights

WINDOWS = 8  # of the held-out text
ROUNDS = 3  # of our short builds; gptqmodel's runs are many and alike, `quantized` is long: one each


def measure(recipe: Path, weights: dict[str, Weights], text: str, length: int) -> dict[str, Quality]:
    """Quality of the source (first) and of the model with each of ``weights``, in one streamed run over ``text``."""
    import torch

    import quantize
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.measuring.quality import measure_quality
    from quantize.recipe.schema import Calibration, Corpus
    from quantize.source.streamed import StreamedModel

    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=recipe.parent / "none"))
    corpus = Calibration(dataset=[Corpus(file=text)], samples=WINDOWS, sequence_length=length)
    ids = sample_tokens(corpus, load_tokenizer(plan.source)).ids
    model = StreamedModel(plan.source, torch.float32, torch.device("cpu"), head=True)
    return {row.branch: row for row in measure_quality(model, ids, weights, 8)}


def figures(row: Quality | None) -> str:
    """Perplexity (KL divergence), as a cell of a table."""
    return f"{row.perplexity:.2f} ({row.kl_divergence:.4f})" if row else "-"


def compare(name: str, title: str, task: Task, variants: list[Variant], evaluation: str, folder: Path) -> None:
    """Run everything of one table and write its section."""
    from quantize.formats.reader import BranchReader

    task.recipe(folder / "prepare.json", variants)
    low = [variant for variant in variants if variant.bits < 8]  # at 8 bits there is nothing left to win
    settings: dict[str, tuple[list[Variant], dict[str, Any]]] = {
        "source": (variants, {"propagate": "source"}),
        "auto": (variants, {}),
        "quantized": (low, {"propagate": "quantized"}),
        "source, mse: false": (low, {"propagate": "source", "mse": False}),
    }
    ours: dict[str, Built] = {}
    for number, (label, (cells, setting)) in enumerate(settings.items()):
        rounds = 1 if label == "quantized" else ROUNDS
        ours[label] = task.build(folder / f"ours{number}", cells, rounds, **setting)
        print(f"{name}: ours, {label}: {ours[label].process.seconds:.0f} s", flush=True)
    one = task.build(folder / "one", variants[:1], ROUNDS, propagate="source")
    theirs: dict[str, Run] = {}
    their_folders = {}
    for variant in variants:
        place = folder / "peer" / variant.name
        theirs[variant.name], built = task.build_by("gptqmodel", place, [variant])
        their_folders[f"gptqmodel: {variant.name}"] = built.folder / variant.name
        print(f"{name}: gptqmodel {variant.name}: {theirs[variant.name].seconds:.0f} s", flush=True)

    folders = {f"{label}: {v.name}": built.folder / v.name for label, built in ours.items() for v in settings[label][0]}
    folders |= their_folders
    readers: dict[str, Weights] = {name: BranchReader(branch) for name, branch in folders.items()}
    quality = measure(folder / "prepare.json", readers, evaluation, task.length)
    replace_section(name, _section(title, task, variants, evaluation, ours, one, theirs, quality))


def _section(
    title: str,
    task: Task,
    variants: list[Variant],
    evaluation: str,
    ours: dict[str, Built],
    one: Built,
    theirs: dict[str, Run],
    quality: dict[str, Quality],
) -> str:
    total = sum(done.seconds for done in theirs.values())
    count = len(variants)
    rows = [
        [
            f"ours, {label}",
            str(len(list(built.folder.iterdir()))),
            f"{built.process.seconds:.0f}",
            f"{total / count * len(list(built.folder.iterdir())) / built.process.seconds:.1f}",
            f"{built.process.peak_bytes / 1e9:.2f} GB",
        ]
        for label, built in ours.items()
    ]
    rows.append(["ours, source", "1", f"{one.process.seconds:.0f}", "", f"{one.process.peak_bytes / 1e9:.2f} GB"])
    peak = max(done.peak_bytes for done in theirs.values())
    rows.append([f"gptqmodel, {count} runs", str(count), f"{total:.0f}", "1", f"{peak / 1e9:.2f} GB"])
    times = table(["run", "branches", "seconds", "gptqmodel's time for as many", "peak RSS"], rows)
    bottleneck = max(ours["source"].stages.items(), key=lambda stage: stage[1])[0]
    ratio = ours["source"].process.seconds / one.process.seconds

    labels = [*ours, "gptqmodel"]
    body = [
        [v.name, *(figures(quality.get(f"{label}: {v.name}")) for label in labels), f"{theirs[v.name].seconds:.0f}"]
        for v in variants
    ]
    base = next(iter(quality.values()))  # the source model
    branches = table(["branch", *labels, "gptqmodel s"], body)
    return f"""## {title}

{task.samples} x {task.length} calibration tokens of {Path(task.calibration).name}, {WINDOWS * task.length} other tokens
of {Path(evaluation).name}; {machine("gptqmodel")}, gptqmodel in float32. Whole processes, start-up
included, all in one call; ours are medians of {ROUNDS} (`quantized`: one run), gptqmodel one run a branch.

{times}

{count} branches take {ratio:.2f} times as long as one (`propagate: source`); the longest stage, and so the next
bottleneck, is {bottleneck}.

Perplexity (KL divergence from the source model, whose perplexity is {base.perplexity:.2f}):

{branches}

Stages, seconds:

{stages_table([*ours.items(), ("source, one branch", one)], "run")}
"""
