"""``propagate: quantized`` against the fully sequential way: statistics anew after every quantized group of linears.

The reference takes five forwards of each block: one for the inputs of q/k/v, then, with these quantized, one for
o_proj, one for gate/up, one for down_proj, and one to move on. It has the same grid and solver.
"""

from __future__ import annotations

from pathlib import Path

import torch

import quantize
from benchmarks.document import machine, replace_section, table
from benchmarks.ours import DAMP, Task, Variant
from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.formats.gptq_reader import GptqReader
from quantize.measure.quality import Quality, Weights, measure_quality
from quantize.methods.gptq import GptqParameters, solve
from quantize.recipe.schema import Calibration, Corpus
from quantize.source.streamed import StreamedModel

WINDOWS = 16


class Solved:
    """Weights by name, as a branch's reader gives them."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def weight(self, module: str) -> torch.Tensor:
        return self.weights[module]


def compare(task: Task, cells: list[Variant], evaluation: str, folder: Path) -> None:
    """Build the cells both of our ways, solve them sequentially, and measure all on the same text."""
    ways = {way: task.build(folder / way, cells, propagate=way) for way in ("source", "quantized")}
    loaded = quantize.load_recipe(folder / "source" / "recipe.json")
    plan = quantize.plan(loaded, dist=folder / "none")
    tokenizer = load_tokenizer(plan.source)
    ids = sample_tokens(loaded.recipe.calibration, tokenizer).ids
    model = StreamedModel(plan.source, plan.table.prefix, torch.float32, torch.device("cpu"), head=True)
    readers: dict[str, Weights] = {
        f"{way}: {cell.name}": GptqReader(built.folder / cell.name) for way, built in ways.items() for cell in cells
    }
    readers |= {f"sequential: {cell.name}": _sequential(model, ids, cell) for cell in cells}
    corpus = Calibration(dataset=[Corpus(file=evaluation)], samples=WINDOWS, sequence_length=task.length)
    rows = {
        row.branch: row
        for row in measure_quality(model, sample_tokens(corpus, tokenizer).ids, readers, 8, progress=False)
    }

    def text(row: Quality) -> str:
        return f"{row.perplexity:.2f} ({row.kl_divergence:.4f})"

    body = [
        [cell.name, *(text(rows[f"{way}: {cell.name}"]) for way in ("source", "quantized", "sequential"))]
        for cell in cells
    ]
    replace_section(
        "sequential",
        f"""## Against the fully sequential way

{Path(task.model["source"]).name}, {task.samples} x {task.length} tokens; {machine()}. Same grid and solver; the
sequential reference takes statistics after every quantized group of linears (five forwards of a block), `quantized`
takes two forwards and leans towards the source (docs/propagation.md). Perplexity (KL divergence), float
{next(iter(rows.values())).perplexity:.2f}:

{table(["branch", "source", "quantized", "sequential"], body)}
""",
    )


def _sequential(model: StreamedModel, ids: object, cell: Variant) -> Solved:
    found = Solved()
    wish = GptqParameters(cell.bits, cell.group_size, cell.desc_act, damp_percent=DAMP)
    activations = Activations(model, ids, 8)  # type: ignore[arg-type]
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
