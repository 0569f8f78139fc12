"""The GPTQ pass: blocks stream by once; each distinct input's statistics solve all branches; results go to disk.

Peak memory is one block, its statistics, the activations and the solver's workspace, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from tqdm import tqdm

from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.statistics import InputStatistics, Timed
from quantize.calibration.tokens import Tokens
from quantize.errors import PlanError, SolveError, SourceError
from quantize.formats import gptq as gptq_format
from quantize.formats.manifest import LedgerEntry
from quantize.formats.safetensors_writer import ShardWriter
from quantize.methods.asymmetric import toward_source
from quantize.methods.gptq import GptqParameters, Solution, solve
from quantize.pipeline.memory import give_back
from quantize.planning import Plan, PlannedVariant
from quantize.source.streamed import Linear, StreamedModel


@dataclass
class Branch:
    """A branch in the making: its open shards, and the ledger of its modules."""

    item: PlannedVariant
    folder: Path
    ledger: list[LedgerEntry] = field(default_factory=list)

    def __enter__(self) -> Branch:
        self.folder.mkdir(parents=True)
        self.writer = ShardWriter(self.folder, self.item.layout.shards).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    @property
    def parameters(self) -> GptqParameters:
        return GptqParameters(**self.item.variant.model_dump(exclude={"branch", "propagate"}))


class GptqPass:
    """One pass over a model for several branches.

    Args:
        timed: a context manager factory that books time to a stage.
        progress: True, False, or None for a bar on a terminal only.
    """

    def __init__(
        self,
        plan: Plan,
        model: StreamedModel,
        tokens: Tokens,
        branches: Sequence[Branch],
        timed: Timed,
        progress: bool | None = None,
    ) -> None:
        self.plan, self.model, self.tokens, self.branches, self.timed = plan, model, tokens, branches, timed
        self.disable = None if progress is None else not progress
        self.gptq = plan.recipe.gptq

    def run(self) -> None:
        """Write every tensor of every branch.

        Raises:
            PlanError: the model's linears are not the plan's.
            SourceError, CalibrationError, SolveError: naming the tensor or module.
        """
        self._check_modules()
        with self.timed("write"):
            self._copy_unquantized()
        calibration = self.plan.recipe.calibration
        batch = max(1, calibration.batch_tokens // calibration.sequence_length)
        sharing = [branch for branch in self.branches if branch.item.variant.propagate == "source"]
        drifting = [branch for branch in self.branches if branch.item.variant.propagate == "quantized"]
        with self.timed("forward"):
            source = Activations(self.model, self.tokens.ids, batch)
            streams = [source.copy() for _ in drifting]
        with ExitStack() as stack:
            for index in tqdm(range(len(self.model)), desc="blocks", unit="block", disable=self.disable):
                with self.timed("load"):
                    stack.close()  # drops the block before
                    block = stack.enter_context(self.model.block(index))
                with self.timed("forward"):
                    shared, own = block_statistics(index, block, source, streams, bool(sharing), self.timed)
                if sharing:
                    for group in shared:
                        self._solve_group(index, group, sharing)
                        group.release()
                for branch, stream, groups in zip(drifting, streams, own, strict=True):
                    self._solve_own(index, block, stream, groups, branch)
                give_back()

    def _solve_own(
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
            weights = [self._weight(name, linear) for name, linear in zip(names, group.linears, strict=True)]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            wishes = [branch.parameters for branch in branches]
            try:
                if group.drift is not None:
                    stacked = self._toward_source(stacked, group.hessian, group.drift)
                energy = ((stacked @ group.hessian) * stacked).sum(dim=1, dtype=torch.float64).cpu()
                solutions = solve(stacked, group.hessian, wishes, self.gptq.rtn_fallback)
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
                branch.ledger.append(self._entry(name, solution, rows, energy, group.tokens))
                first = rows.stop
        return solutions

    def _toward_source(self, weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
        try:
            return toward_source(weight, hessian, drift)
        except SolveError:
            if self.gptq.rtn_fallback:
                return weight  # the solve meets the same Hessian, rounds to nearest and says so
            raise

    def _weight(self, name: str, linear: Linear) -> torch.Tensor:
        """The stored weight [N, K] in float32, exact even where the forward pass runs in less."""
        if linear.weight.dtype == torch.float32:
            return linear.weight.contiguous()
        stored = self.model.read(f"{name}.weight").to(self.model.device, torch.float32)
        return stored if stored.shape == linear.weight.shape else stored.t().contiguous()

    def _write_linear(self, branch: Branch, name: str, solution: Solution, rows: slice) -> None:
        with self.timed("pack"):
            tensors = gptq_format.encode(
                solution.codes[rows],
                solution.scales[:, rows],
                solution.zeros[:, rows],
                solution.g_idx,
                branch.item.variant.bits,
                self.gptq.checkpoint_format,
            )
        with self.timed("write"):
            for suffix, tensor in tensors.items():
                branch.writer.write(f"{name}.{suffix}", tensor)
            if f"{name}.bias" in self.plan.source.checkpoint.tensors:
                branch.writer.write(f"{name}.bias", _half(self.model.read(f"{name}.bias"), name))
            elif self.gptq.zero_bias:
                branch.writer.write(f"{name}.bias", torch.zeros(rows.stop - rows.start, dtype=torch.float16))

    def _entry(self, name: str, solution: Solution, rows: slice, energy: torch.Tensor, tokens: int) -> LedgerEntry:
        outcome = "rtn_fallback" if solution.fallback else "damp_raised" if solution.damp_raised else "solved"
        whole = float(energy[rows].sum())
        entry = LedgerEntry(
            module=name,
            outcome=outcome,
            damp_percent=float(f"{solution.damp_percent:.6g}"),
            dead_columns=solution.dead_columns,
            relative_error=float(f"{float(solution.row_error[rows].sum()) / whole:.6g}") if whole > 0 else 0.0,
            tokens=tokens,
        )
        for fatal in self.gptq.fail_on:
            if outcome == fatal or (fatal == "dead_columns" and entry.dead_columns):
                raise SolveError(f"{name}: {fatal}, which gptq.fail_on of the recipe makes an error")
        return entry

    def _copy_unquantized(self) -> None:
        """Embeddings, norms, head: the source's bytes, in every branch."""
        replaced = self.plan.table.quantized_tensors
        for name in self.plan.source.checkpoint.tensors:
            if name not in replaced:
                tensor = self.model.read(name)
                for branch in self.branches:
                    branch.writer.write(name, tensor)

    def _check_modules(self) -> None:
        """The plan found its linears by name and shape; they must be the model's real ones."""
        model, source = self.model, self.plan.source
        real = set()
        for index in range(len(model)):
            for linear in model.linears(model.blocks[index]):
                try:
                    real.add(model.checkpoint_name(index, linear.local))
                except KeyError:
                    name = f"{model.block_prefix}{index}.{linear.local}.weight"
                    raise SourceError(f"{source.named}: the checkpoint lacks the tensor {name}") from None
        odd = sorted(real ^ {linear.name for linear in self.plan.table.linears})
        if odd:
            where = "not in the checkpoint's blocks" if odd[0] in real else "no linear of the model"
            raise PlanError(f"architecture '{source.checkpoint.model_type}' cannot be quantized: {odd[0]} is {where}")


def _half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise SourceError(f"{name}.bias: does not fit float16, in which the GPTQ format stores a bias")
    return half
