"""The calibration pass: blocks stream by once; their inputs' statistics serve every branch of every method.

Peak memory is one block, its statistics, the activations and the solver's workspace, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.branches.branch import Branch
from quantize.building.awq_blocks import AwqBlocks
from quantize.building.build import Build
from quantize.building.gptq_blocks import GptqBlocks
from quantize.calibration.hessians import HessianFiles
from quantize.calibration.kinds import kind_of
from quantize.calibration.parts import cut
from quantize.calibration.statistics import InputStatistics
from quantize.calibration.store import StatisticsStore
from quantize.calibration.tokens import Tokens
from quantize.dist.resume import Block, Unfinished
from quantize.errors import PlanError, SourceError
from quantize.executors.api import Streams, Windows
from quantize.executors.memory import give_back
from quantize.gguf.vectors import OUTPUTS, queries_of
from quantize.recipe.methods import GptqVariant
from quantize.source.streamed import StreamedModel


@dataclass(frozen=True)
class PassState:
    """What a pass works on.

    Attributes:
        model: the source. tokens: the calibration windows. branches: open for writing.
        diagonals: where to put the diagonal of each linear's H, for an importance matrix; None gathers none. With
            MLA also the sums of squares of its queries.
        unfinished: where progress is recorded, and where to resume from.
        store: where the source's statistics are kept, or None. What it holds of all blocks is taken from there.
    """

    model: StreamedModel
    tokens: Tokens
    branches: Sequence[Branch]
    diagonals: dict[str, tuple[NDArray[np.float32], int]] | None
    unfinished: Unfinished
    store: StatisticsStore | None


class CalibrationPass:
    """One pass over a model for several branches."""

    def __init__(self, build: Build, state: PassState) -> None:
        self.build, self.plan, self.reporter, self.executor = build, build.plan, build.reporter, build.executor
        self.model, self.tokens, self.branches = state.model, state.tokens, state.branches
        self.diagonals, self.unfinished, self.store = state.diagonals, state.unfinished, state.store
        self.hessians = HessianFiles(self.unfinished.hessians) if self.unfinished.state.hessians else None
        if self.store and self.model.hands_on and not self.unfinished.state.from_store:
            self.reporter.say(
                "statistics are not kept: blocks of this architecture leave keys and values for later ones"
            )
            self.store = None
        self._queries = self._find_queries()
        self._kinds: set[object] = set()  # of blocks whose statistics were written to the store
        branches = state.branches
        self.sharing = [branch for branch in branches if _propagate(branch) == "source"]
        self.drifting = [branch for branch in branches if _propagate(branch) == "quantized"]
        self.awq = [branch for branch in branches if branch.item.method == "awq"]

    def _find_queries(self) -> frozenset[str]:
        """Linears whose outputs the importance matrix needs; see :mod:`quantize.gguf.vectors`."""
        if self.diagonals is None or self.plan.gguf is None:
            return frozenset()
        header = self.plan.gguf.conversion.header(self.reporter)
        return queries_of(header.made_of, (linear.name for linear in self.plan.table.linears))

    def run(self) -> None:
        """Write every tensor of every branch.

        Raises:
            PlanError: the model's linears are not the plan's.
            SourceError, CalibrationError, SolveError: naming the tensor or module.
        """
        self._check_modules()
        done = self.unfinished.state.next_block
        if not done:
            with self.reporter.stage("write"):
                self._copy_unquantized()
        recipe = self.plan.recipe
        batch = max(1, self.plan.memory.batch_tokens // recipe.calibration.sequence_length)
        gptq = GptqBlocks(self.build, self.model) if recipe.gptq else None
        awq = AwqBlocks(self.build, self.model) if recipe.awq else None
        with ExitStack() as ending, ExitStack() as stack:
            with self.reporter.stage("forward"):
                if streams := self._streams(batch):
                    ending.callback(streams.close)
                self.model.drop_outside()
            advance = ending.enter_context(self.reporter.progress("blocks", len(self.model), "block", done))
            for index in range(done, len(self.model)):
                with self.reporter.stage("load"):
                    stack.close()  # drops the block before
                    block = stack.enter_context(self.model.block(index))
                self._solve_block(index, block, streams, gptq, awq)
                with self.reporter.stage("write"):
                    self._keep(index + 1, streams)
                give_back()
                advance(1)
        self.unfinished.drop_states()

    def _streams(self, batch: int) -> Streams | None:
        """The windows' states as they enter the first block that is to do; None where kept statistics take the place
        of a forward pass."""
        parts = cut(self.tokens.ids, self.plan.shards)
        if self.unfinished.state.from_store:
            self.model.embed(torch.from_numpy(parts[0][:batch]))  # AWQ tries scales on a batch of this size
            return None
        trust, spilled = self.plan.recipe.model.trust_remote_code, self.plan.memory.spilled
        return self.executor.streams(
            Windows(self.model, parts, batch, 1 + len(self.drifting), self.unfinished, spilled, trust), self.reporter
        )

    def _keep(self, next_block: int, streams: Streams | None) -> None:
        if self.model.hands_on and next_block < len(self.model):
            return  # what blocks leave for later ones is in memory only: such a pass begins anew after an interruption
        states = streams.keep(next_block) if streams and next_block < len(self.model) else {}
        ledger: dict[str, list[dict[str, Any]]] = {}
        written: dict[str, dict[str, str]] = {}
        for branch in self.branches:
            branch.writer.sync()
            rows, written[branch.item.label] = branch.take_unnoted()
            ledger[branch.item.label] = [asdict(row) for row in rows]
        shape = streams.shape if streams else ()
        self.unfinished.keep(Block(next_block, shape, ledger, written, states), self.diagonals)

    def _statistics(
        self, index: int, block: nn.Module, streams: Streams | None, awq: AwqBlocks | None
    ) -> tuple[list[InputStatistics], list[list[InputStatistics]], torch.Tensor | None]:
        """Statistics of the source and of each stream, and a batch of the block's input, where AWQ asks for it."""
        wanted = bool(awq and self.awq and awq.wants_input(block))
        if not streams:
            assert self.store
            with self.reporter.stage("statistics"):
                shared, sample = self.store.read(index, self.model.linears(block), self.model.device)
            return shared, [], sample if wanted else None
        store = self.store if self.store and not self.store.has(index) else None
        first = store is not None and kind_of(block) not in self._kinds
        gather = bool(self.sharing or self.awq or self.diagonals is not None or store or self.hessians)
        with self.reporter.stage("forward"):
            gathered = streams.statistics(index, block, gather, wanted or first)
        shared, *own = gathered.streams
        if store:
            with self.reporter.stage("write"):
                store.write(index, shared, gathered.sample if first else None)
            self._kinds.add(kind_of(block))
        return shared, own, gathered.sample if wanted else None

    def _solve_block(
        self,
        index: int,
        block: nn.Module,
        streams: Streams | None,
        gptq: GptqBlocks | None,
        awq: AwqBlocks | None,
    ) -> None:
        shared, own, sample = self._statistics(index, block, streams, awq)
        if self.diagonals is not None:
            for group in shared:
                diagonal = group.hessian.diagonal().cpu().numpy() * np.float32(group.tokens > 0)
                for linear in group.linears:
                    name = self.model.checkpoint_name(index, linear.local)
                    self.diagonals[name] = diagonal, group.tokens
                    if name in self._queries:
                        weight = self.model.stored_weight(index, linear)
                        squares = ((weight @ group.hessian) * weight).sum(dim=1).clamp(min=0)
                        self.diagonals[name + OUTPUTS] = squares.cpu().numpy(), group.tokens
        if self.hessians:
            with self.reporter.stage("write"):
                self._save_hessians(index, shared, self.hessians)
        # other workers solve while AWQ is solved here
        common = gptq.begin(index, shared, self.sharing) if gptq and self.sharing else []
        drifting = []
        if gptq:
            pairs = zip(self.drifting, own, strict=True)
            drifting = [gptq.begin(index, groups, [branch]) for branch, groups in pairs]
        if awq and self.awq:
            if sample is not None:
                self.model.recall(torch.from_numpy(self.tokens.ids[: len(sample)]))  # whose states the sample is
            awq.solve_block(index, block, shared, sample, self.awq)
        if gptq:
            gptq.finish(index, common, self.sharing)
            for number, (branch, begun) in enumerate(zip(self.drifting, drifting, strict=True), 1):
                weights = gptq.finish_own(index, begun, branch)
                if streams and index + 1 < len(self.model):
                    with self.reporter.stage("forward"):
                        streams.advance(index, block, number, weights)

    def _save_hessians(self, index: int, groups: Sequence[InputStatistics], files: HessianFiles) -> None:
        """For error feedback on GGUF levels, of the inputs that a token reached."""
        inputs = []
        for group in groups:
            names = [self.model.checkpoint_name(index, linear.local) for linear in group.linears]
            if group.tokens and not self.plan.hessians.isdisjoint(names):
                inputs.append((names, group.hessian, group.tokens))
        files.write(index, inputs)

    def _copy_unquantized(self) -> None:
        """Embeddings, norms, head: the source's bytes, in every branch. AWQ changes what lies in the blocks."""
        table = self.plan.table
        for name in self.plan.source.checkpoint.tensors:
            if name in table.quantized_tensors:
                continue
            tensor = self.model.read(name)
            for branch in self.branches:
                if not (branch.item.method == "awq" and table.is_in_block(name)):
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


def _propagate(branch: Branch) -> str | None:
    """Whose activations a GPTQ branch is solved from; None for other methods."""
    variant = branch.item.variant
    return variant.propagate if isinstance(variant, GptqVariant) else None
