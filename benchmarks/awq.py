"""AWQ: what it adds to the set of eight, and its quality against gptqmodel's AWQ on the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import quantize
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import Built, Task, Variant, stages_table
from benchmarks.peers import WINDOWS, figures, measure
from quantize.formats.reader import BranchReader
from quantize.formats.tensor_file import TensorFile
from quantize.measuring.quality import Weights
from quantize.methods.gptq import GptqParameters, round_to_nearest
from quantize.source.checkpoint import read_checkpoint

GROUP_SIZE = 64
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, rounding: nearest": {"rounding": "nearest"},
    "ours, rounding: nearest, mse: false": {"rounding": "nearest", "mse": False},
    "ours, zero_point: false": {"zero_point": False},
}


class Nearest:
    """The source's linears rounded to nearest on the same grid: the yardstick."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, read_checkpoint(folder)

    def tensor(self, name: str) -> torch.Tensor:
        return TensorFile(self.folder / self.checkpoint.tensors[name].file).read(name)

    def weight(self, module: str) -> torch.Tensor:
        weight = self.tensor(f"{module}.weight").float()
        wish = GptqParameters(4, GROUP_SIZE, sym=False, mse=False)
        return round_to_nearest(weight, torch.eye(weight.shape[1]), wish).dequantize()


def compare(name: str, title: str, task: Task, eight: list[Variant], evaluation: str, peer: bool, folder: Path) -> None:
    """Run everything and write a section.

    Args:
        peer: run gptqmodel too; on a CPU without bfloat16 its AWQ takes long for the demo's model: give it 8 samples.
    """
    recipe = task.recipe(folder / "prepare.json", eight)
    source = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=folder / "none")).source.folder
    one = [{"group_size": GROUP_SIZE, "branch": "awq"}]
    theirs = None
    if peer:
        theirs, their_build = task.build_by("gptqmodel", folder / "peer", [], one)
        print(f"{name}: gptqmodel {theirs.seconds:.0f} s", flush=True)
    alone = task.build(folder / "alone", [], awq=one)
    asked = [{"group_size": GROUP_SIZE, "branch": f"b{n}", **setting} for n, setting in enumerate(OURS.values())]
    every = task.build(folder / "every", [], awq=asked)
    readers: dict[str, Weights] = {label: BranchReader(every.awq / f"b{n}") for n, label in enumerate(OURS)}
    readers["nearest, unscaled"] = Nearest(source)
    if theirs:
        readers["gptqmodel"] = BranchReader(their_build.awq / "awq")
    rows = measure(recipe, readers, evaluation, task.length)
    seconds = {"ours": f"{alone.process.seconds:.0f}", "gptqmodel": f"{theirs.seconds:.0f}" if theirs else ""}
    body = [[label, figures(rows[label]), seconds.get(label, "")] for label in readers]
    by_whom = ", gptqmodel in bfloat16 with its torch backend (it has no other here)" if theirs else ""
    replace_section(
        name,
        f"""## {title}

4 bits, group_size {GROUP_SIZE}, zero points; {task.samples} x {task.length} calibration tokens of
{Path(task.calibration).name}, {WINDOWS * task.length} other tokens of {Path(evaluation).name};
{machine("gptqmodel")}{by_whom}. Seconds are of whole processes, one run each, all in one call. Perplexity
(KL divergence); the source model's perplexity is {next(iter(rows.values())).perplexity:.2f}:

{table(["run", "quality", "seconds"], body)}

{"" if peer else _added(task, eight, one, alone, folder)}
""",
    )


def _added(task: Task, eight: list[Variant], one: list[dict[str, Any]], alone: Built, folder: Path) -> str:
    """What an AWQ branch adds to the set of eight."""
    without = task.build(folder / "without", eight)
    added = task.build(folder / "with", eight, awq=one)
    builds = [("eight GPTQ branches", without), ("and one AWQ branch", added), ("one AWQ branch alone", alone)]
    return f"""Adding the AWQ branch to the recipe of eight GPTQ branches takes
{added.process.seconds / without.process.seconds - 1:.0%} more time:

{stages_table(builds, "build")}"""
