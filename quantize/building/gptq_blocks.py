"""GPTQ on the blocks of the pass: each distinct input's statistics solve all branches, and the results are written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantize.building.branch import Branch, half_bias
from quantize.calibration.statistics import InputStatistics, Timed
from quantize.errors import SolveError
from quantize.executors.api import Job, Wait, Workers
from quantize.formats import gptq as gptq_format
from quantize.methods.gptq import GptqParameters, Solution
from quantize.recipe.methods import Gptq
from quantize.source.streamed import StreamedModel


@dataclass(frozen=True)
class Begun:
    """A solve on its way: the input's statistics, and what waits for the solutions."""

    group: InputStatistics
    wait: Wait


class GptqBlocks:
    """Solves blocks for GPTQ branches."""

    def __init__(
        self, model: StreamedModel, section: Gptq, timed: Timed, row_budget: int | None, workers: Workers
    ) -> None:
        self.model, self.section, self.timed, self.row_budget = model, section, timed, row_budget
        self.workers = workers

    def begin(self, index: int, groups: list[InputStatistics], branches: Sequence[Branch]) -> list[Begun]:
        """Have a block's inputs solved for ``branches``, the widest last, with the others released."""
        with self.timed("solve"):
            return [
                Begun(group, self.workers.start(functools.partial(self._job, index, group, branches)))
                for group in sorted(groups, key=lambda group: group.hessian.shape[0])
            ]

    def finish(self, index: int, begun: list[Begun], branches: Sequence[Branch]) -> None:
        """``propagate: source``: write what all branches get from the same statistics, releasing them on the way."""
        for one in begun:
            self._finish(index, one, branches)

    def finish_own(self, index: int, begun: list[Begun], branch: Branch) -> dict[str, torch.Tensor]:
        """``propagate: quantized``: write it, and return the weights that the branch's own inputs now meet."""
        weights: dict[str, torch.Tensor] = {}
        for one in begun:
            (solution,) = self._finish(index, one, [branch])
            rows = [linear.weight.shape[0] for linear in one.group.linears]
            parts = torch.split(solution.dequantize(), rows)
            weights |= {linear.local: part for linear, part in zip(one.group.linears, parts, strict=True)}
        return weights

    def _job(self, index: int, group: InputStatistics, branches: Sequence[Branch]) -> Job:
        with torch.inference_mode():
            weights = [self.model.stored_weight(index, linear) for linear in group.linears]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        wishes = [_parameters(branch) for branch in branches]
        return Job(stacked, group.hessian, group.drift, wishes, self.section.rtn_fallback, self.row_budget)

    def _finish(self, index: int, begun: Begun, branches: Sequence[Branch]) -> list[Solution]:
        """Wait for the linears that share an input, and write what each branch got."""
        group = begun.group
        names = [self.model.checkpoint_name(index, linear.local) for linear in group.linears]
        try:
            with self.timed("solve"):
                solved = begun.wait()
        except SolveError as error:
            raise SolveError(
                f"{', '.join(names)}: {error}; calibrate on more or other text, raise gptq.damp_percent, or set "
                "gptq.rtn_fallback to round such modules to nearest"
            ) from None
        for branch, solution in zip(branches, solved.solutions, strict=True):
            first = 0
            for name, linear in zip(names, group.linears, strict=True):
                rows = slice(first, first + linear.weight.shape[0])
                self._write_linear(branch, name, solution, rows)
                branch.record(name, solution, rows, solved.energy, group.tokens)
                first = rows.stop
        group.release()
        return solved.solutions

    def _write_linear(self, branch: Branch, name: str, solution: Solution, rows: slice) -> None:
        with self.timed("pack"):
            tensors = gptq_format.encode(
                solution.codes[rows],
                solution.scales[:, rows],
                solution.zeros[:, rows],
                solution.g_idx,
                branch.item.variant.bits,
                self.section.checkpoint_format,
            )
        with self.timed("write"):
            if f"{name}.bias" in self.model.source.checkpoint.tensors:
                tensors["bias"] = half_bias(self.model.read(f"{name}.bias"), name)
            elif self.section.zero_bias:
                tensors["bias"] = torch.zeros(rows.stop - rows.start, dtype=torch.float16)
            branch.write(name, tensors)


def _parameters(branch: Branch) -> GptqParameters:
    return GptqParameters(**branch.item.variant.model_dump(exclude={"branch", "propagate", "engine"}))
