"""GPTQ on the blocks of the pass: each distinct input's statistics solve all branches, and the results are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quantize.calibration.forward import Activations
from quantize.calibration.statistics import InputStatistics, Timed
from quantize.errors import SolveError
from quantize.formats import gptq as gptq_format
from quantize.methods.asymmetric import toward_source
from quantize.methods.gptq import GptqParameters, Solution, solve
from quantize.pipeline.branch import Branch, energy_of, half_bias
from quantize.recipe.methods import Gptq
from quantize.source.streamed import Linear, StreamedModel


class GptqBlocks:
    """Solves blocks for GPTQ branches."""

    def __init__(self, model: StreamedModel, section: Gptq, timed: Timed, row_budget: int | None) -> None:
        self.model, self.section, self.timed, self.row_budget = model, section, timed, row_budget

    def solve_shared(self, index: int, groups: list[InputStatistics], branches: Sequence[Branch]) -> None:
        """``propagate: source``: all branches from the same statistics, which are released on the way."""
        for group in sorted(groups, key=lambda group: group.hessian.shape[0]):  # the widest with the others released
            self._solve_group(index, group, branches)
            group.release()

    def solve_own(
        self, index: int, block: nn.Module, stream: Activations, groups: list[InputStatistics], branch: Branch
    ) -> None:
        """``propagate: quantized``: solve from the branch's own inputs, then send them through its own block."""
        replaced: list[tuple[Linear, torch.Tensor]] = []
        for group in groups:
            (solution,) = self._solve_group(index, group, [branch])
            group.release()
            rows = [linear.weight.shape[0] for linear in group.linears]
            replaced += zip(group.linears, solution.dequantize().split(rows), strict=True)
        if index + 1 == len(self.model):
            return
        with self.timed("forward"), torch.inference_mode():
            kept = [(linear, linear.weight.clone()) for linear, _ in replaced]
            for linear, weight in replaced:
                linear.set_weight(weight)
            stream.advance(index, block)
            for linear, weight in kept:
                linear.set_weight(weight)

    def _solve_group(self, index: int, group: InputStatistics, branches: Sequence[Branch]) -> list[Solution]:
        """Solve the linears that share an input, stacked, for all ``branches``, and write the results."""
        names = [self.model.checkpoint_name(index, linear.local) for linear in group.linears]
        with self.timed("solve"), torch.inference_mode():
            weights = [self.model.stored_weight(index, linear) for linear in group.linears]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            wishes = [_parameters(branch) for branch in branches]
            try:
                if group.drift is not None:
                    stacked = self._toward_source(stacked, group.hessian, group.drift)
                energy = energy_of(stacked, group.hessian)
                solutions = solve(stacked, group.hessian, wishes, self.section.rtn_fallback, row_budget=self.row_budget)
            except SolveError as error:
                raise SolveError(
                    f"{', '.join(names)}: {error}; calibrate on more or other text, raise gptq.damp_percent, or set "
                    "gptq.rtn_fallback to round such modules to nearest"
                ) from None
        for branch, solution in zip(branches, solutions, strict=True):
            first = 0
            for name, weight in zip(names, weights, strict=True):
                rows = slice(first, first + weight.shape[0])
                self._write_linear(branch, name, solution, rows)
                branch.record(name, solution, rows, energy, group.tokens)
                first = rows.stop
        return solutions

    def _toward_source(self, weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
        try:
            return toward_source(weight, hessian, drift)
        except SolveError:
            if self.section.rtn_fallback:
                return weight  # the solve meets the same Hessian, rounds to nearest and says so
            raise

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
