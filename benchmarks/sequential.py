"""``propagate: quantized`` against the fully sequential way: statistics anew after every quantized group of linears.

The reference takes five forwards of each block: one for the inputs of q/k/v, then, with these quantized, one for
o_proj, one for gate/up, one for down_proj, and one to move on. It has the same grid and solver.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import quantize
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import DAMP, Task, Variant
from benchmarks.peers import figures, measure
from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.formats.reader import BranchReader
from quantize.measuring.quality import Weights
from quantize.methods.gptq import GptqParameters, solve
from quantize.source.streamed import StreamedModel


class Solved:
    """Weights by name, as a branch's reader gives them; all else is the source's."""

    def __init__(self, model: StreamedModel) -> None:
        self.model = model
        self.weights: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        return self.model.read(name)

    def weight(self, module: str) -> torch.Tensor:
        return self.weights[module]


def compare(task: Task, cells: list[Variant], evaluation: str, folder: Path) -> None:
    """Build the cells both of our ways, solve them sequentially, and measure all on the same text."""
    ways = {way: task.build(folder / way, cells, propagate=way) for way in ("source", "quantized")}
    loaded = quantize.load_recipe(folder / "source" / "recipe.json")
    plan = quantize.plan(loaded, quantize.PlanOptions(dist=folder / "none"))
    ids = sample_tokens(loaded.recipe.calibration, load_tokenizer(plan.source)).ids
    model = StreamedModel(plan.source, torch.float32, torch.device("cpu"))
    readers: dict[str, Weights] = {
        f"{way}: {cell.name}": BranchReader(built.folder / cell.name) for way, built in ways.items() for cell in cells
    }
    readers |= {f"sequential: {cell.name}": _sequential(model, ids, cell) for cell in cells}
    rows = measure(folder / "source" / "recipe.json", readers, evaluation, task.length)
    body = [
        [cell.name, *(figures(rows[f"{way}: {cell.name}"]) for way in ("source", "quantized", "sequential"))]
        for cell in cells
    ]
    replace_section(
        "sequential",
        f"""## Against the fully sequential way

{Path(task.model["source"]).name}, {task.samples} x {task.length} tokens; {machine()}. Same grid and solver; the
sequential reference takes statistics after every quantized group of linears (five forwards of a block), `quantized`
takes two forwards and leans towards the source (docs/solver.md). Perplexity (KL divergence), float
{next(iter(rows.values())).perplexity:.2f}:

{table(["branch", "source", "quantized", "sequential"], body)}
""",
    )


def _sequential(model: StreamedModel, ids: np.ndarray, cell: Variant) -> Solved:
    found = Solved(model)
    wish = GptqParameters(cell.bits, cell.group_size, cell.desc_act, damp_percent=DAMP)
    activations = Activations(model, ids, 8)
    for index in range(len(model)):
        with model.block(index) as block, torch.inference_mode():
            done: set[str] = set()
            while True:
                # statistics of what the block computes with the groups quantized so far
                groups, _ = block_statistics(index, block, activations.copy())
                group = next((g for g in groups if g.linears[0].local not in done), None)
                if group is None:
                    break
                weights = [linear.weight.clone() for linear in group.linears]
                (solution,) = solve(torch.cat(weights), group.hessian, [wish])
                parts = solution.dequantize().split([weight.shape[0] for weight in weights])
                for linear, part in zip(group.linears, parts, strict=True):
                    linear.set_weight(part)
                    found.weights[model.checkpoint_name(index, linear.local)] = part.clone()
                    done.add(linear.local)
            activations.advance(index, block)
    return found
