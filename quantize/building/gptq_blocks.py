"""GPTQ on the blocks of the pass: each distinct input's statistics solve all branches, and the results are written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantize.branches.branch import Branch, half_bias
from quantize.building.build import Build
from quantize.calibration.statistics import InputStatistics
from quantize.errors import SolveError
from quantize.executors.api import Future, Job
from quantize.formats import gptq as gptq_format
from quantize.methods.gptq import GptqParameters, Solution
from quantize.methods.products import no_products
from quantize.source.streamed import StreamedModel


@dataclass(frozen=True)
class PendingSolve:
    """A solve that was submitted: the input's statistics, and the future of the solutions."""

    group: InputStatistics
    future: Future


class GptqBlocks:
    """Solves blocks for GPTQ branches."""

    def __init__(self, build: Build, model: StreamedModel) -> None:
        assert build.plan.recipe.gptq
        self.model, self.section, self.reporter = model, build.plan.recipe.gptq, build.reporter
        self.row_budget, self.executor = build.plan.memory.row_budget, build.executor

    def begin(self, index: int, groups: list[InputStatistics], branches: Sequence[Branch]) -> list[PendingSolve]:
        """Have a block's inputs solved for ``branches``, the widest last, with the others released."""
        with self.reporter.stage("solve"):
            return [
                PendingSolve(group, self.executor.submit(functools.partial(self._job, index, group, branches)))
                for group in sorted(groups, key=lambda group: group.hessian.shape[0])
            ]

    def finish(self, index: int, pending: list[PendingSolve], branches: Sequence[Branch]) -> None:
        """``propagate: source``: write what all branches get from the same statistics, releasing them on the way."""
        for one in pending:
            self._finish(index, one, branches)

    def finish_own(self, index: int, pending: list[PendingSolve], branch: Branch) -> dict[str, torch.Tensor]:
        """``propagate: quantized``: write it, and return the weights that the branch's own inputs now meet."""
        weights: dict[str, torch.Tensor] = {}
        for one in pending:
            (solution,) = self._finish(index, one, [branch])
            rows = [linear.weight.shape[0] for linear in one.group.linears]
            parts = torch.split(solution.dequantize(), rows)
            weights |= {linear.local: part for linear, part in zip(one.group.linears, parts, strict=True)}
        return weights

    def _job(self, index: int, group: InputStatistics, branches: Sequence[Branch]) -> Job:
        with torch.inference_mode():
            weights = [self.model.stored_weight(index, linear) for linear in group.linears]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        parameters = [_parameters(branch) for branch in branches]
        return Job(stacked, group.hessian, group.drift, parameters, self.section.rtn_fallback, self.row_budget)

    def _finish(self, index: int, pending: PendingSolve, branches: Sequence[Branch]) -> list[Solution]:
        """Wait for the linears that share an input, and write what each branch got."""
        group = pending.group
        names = [self.model.checkpoint_name(index, linear.local) for linear in group.linears]
        try:
            with self.reporter.stage("solve"):
                solved = pending.future()
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
                branch.record(name, solution, rows, energy=solved.energy, tokens=group.tokens)
                first = rows.stop
        group.release()
        return solved.solutions

    def _write_linear(self, branch: Branch, name: str, solution: Solution, rows: slice) -> None:
        with self.reporter.stage("pack"), no_products():
            tensors = gptq_format.encode(
                solution.codes[rows],
                solution.scales[:, rows],
                solution.zeros[:, rows],
                solution.g_idx,
                bits=branch.item.variant.bits,
                checkpoint_format=self.section.checkpoint_format,
            )
        with self.reporter.stage("write"):
            if f"{name}.bias" in self.model.source.checkpoint.tensors:
                tensors["bias"] = half_bias(self.model.read(f"{name}.bias"), name)
            elif self.section.zero_bias:
                tensors["bias"] = torch.zeros(rows.stop - rows.start, dtype=torch.float16)
            branch.write(name, tensors)


def _parameters(branch: Branch) -> GptqParameters:
    return GptqParameters(**branch.item.variant.model_dump(exclude={"branch", "propagate", "engine"}))
