"""The calibration pass: blocks stream by once; their inputs' statistics serve every branch of every method.

Peak memory is one block, its statistics, the activations and the solver's workspace, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from torch import nn
from tqdm import tqdm

from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.statistics import Timed
from quantize.calibration.tokens import Tokens
from quantize.errors import PlanError, SourceError
from quantize.pipeline.awq_blocks import AwqBlocks
from quantize.pipeline.branch import Branch
from quantize.pipeline.gptq_blocks import GptqBlocks
from quantize.pipeline.memory import give_back
from quantize.planning import Plan
from quantize.recipe.methods import GptqVariant
from quantize.source.streamed import StreamedModel


class CalibrationPass:
    """One pass over a model for several branches.

    Args:
        diagonals: where to put the diagonal of each linear's H, for an importance matrix; None gathers none.
        timed: a context manager factory that books time to a stage.
        progress: True, False, or None for a bar on a terminal only.
    """

    def __init__(
        self,
        plan: Plan,
        model: StreamedModel,
        tokens: Tokens,
        branches: Sequence[Branch],
        diagonals: dict[str, tuple[np.ndarray, int]] | None,
        timed: Timed,
        progress: bool | None = None,
    ) -> None:
        self.diagonals = diagonals
        self.plan, self.model, self.tokens, self.branches, self.timed = plan, model, tokens, branches, timed
        self.disable = None if progress is None else not progress
        self.sharing = [branch for branch in branches if _propagate(branch) == "source"]
        self.drifting = [branch for branch in branches if _propagate(branch) == "quantized"]
        self.awq = [branch for branch in branches if branch.item.method == "awq"]

    def run(self) -> None:
        """Write every tensor of every branch.

        Raises:
            PlanError: the model's linears are not the plan's.
            SourceError, CalibrationError, SolveError: naming the tensor or module.
        """
        self._check_modules()
        with self.timed("write"):
            self._copy_unquantized()
        recipe = self.plan.recipe
        batch = max(1, recipe.calibration.batch_tokens // recipe.calibration.sequence_length)
        gptq = GptqBlocks(self.model, recipe.gptq, self.timed) if recipe.gptq else None
        awq = AwqBlocks(self.model, self.plan.table, recipe.awq, self.timed) if recipe.awq else None
        with self.timed("forward"):
            source = Activations(self.model, self.tokens.ids, batch)
            streams = [source.copy() for _ in self.drifting]
        with ExitStack() as stack:
            for index in tqdm(range(len(self.model)), desc="blocks", unit="block", disable=self.disable):
                with self.timed("load"):
                    stack.close()  # drops the block before
                    block = stack.enter_context(self.model.block(index))
                self._run_block(index, block, source, streams, gptq, awq)
                give_back()

    def _run_block(
        self,
        index: int,
        block: nn.Module,
        source: Activations,
        streams: Sequence[Activations],
        gptq: GptqBlocks | None,
        awq: AwqBlocks | None,
    ) -> None:
        gather = bool(self.sharing or self.awq or self.diagonals is not None)
        entered = source.first() if awq and self.awq and awq.wants_input(block) else None
        with self.timed("forward"):
            shared, own = block_statistics(index, block, source, streams, gather, self.timed)
        if self.diagonals is not None:
            for group in shared:
                diagonal = group.hessian.diagonal().cpu().numpy() * np.float32(group.tokens > 0)
                for linear in group.linears:
                    self.diagonals[self.model.checkpoint_name(index, linear.local)] = diagonal, group.tokens
        if awq and self.awq:
            awq.solve_block(index, block, shared, entered, self.awq)
        if gptq:
            if self.sharing:
                gptq.solve_shared(index, shared, self.sharing)
            for branch, stream, groups in zip(self.drifting, streams, own, strict=True):
                gptq.solve_own(index, block, stream, groups, branch)

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
