"""AWQ on the blocks of the pass: scales from the statistics at hand, folded into the operations before."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantize.branches.branch import Branch, half_bias
from quantize.building.build import Build
from quantize.calibration.folding import Fold, find_folds
from quantize.calibration.kinds import kind_of
from quantize.calibration.statistics import InputStatistics
from quantize.errors import SolveError
from quantize.executors.local import energy_of
from quantize.formats import awq as awq_format
from quantize.methods.awq import (
    AwqParameters,
    Scales,
    divided,
    no_smaller_than_half,
    quantize_scaled,
    search_scales,
)
from quantize.methods.products import no_products
from quantize.planning.modules import SCALED_ACTIVATIONS
from quantize.source.streamed import StreamedModel

Folds = dict[str, Fold | None]


@dataclass
class _Scaled:
    """A block's scales for one branch.

    Attributes:
        columns: by the leader of each group, what its weights' columns are multiplied by, [K].
        rows: by linear, what its rows and bias are divided by, [N].
        stored: tensors outside the linears that changed, by their names in the checkpoint.
        ratios, producers: by leader, for the ledger.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    producers: dict[str, str | None] = field(default_factory=dict)


class AwqBlocks:
    """Solves blocks for AWQ branches."""

    def __init__(self, build: Build, model: StreamedModel) -> None:
        assert build.plan.recipe.awq
        self.model, self.table, self.section = model, build.plan.table, build.plan.recipe.awq
        self.reporter = build.reporter
        self._known: dict[Hashable, Folds] = {}

    def wants_input(self, block: nn.Module) -> bool:
        """Whether the folds of such a block are still to be found, for which its input is needed."""
        return kind_of(block) not in self._known

    def solve_block(
        self,
        index: int,
        block: nn.Module,
        groups: list[InputStatistics],
        sample: torch.Tensor | None,
        branches: Sequence[Branch],
    ) -> None:
        """Scale, round and write every linear of a block, and whatever else lies in it.

        Args:
            sample: a batch of what entered the block, where :meth:`wants_input` asked for it.
        """
        with self.reporter.stage("solve"):
            if sample is not None:
                activation, _ = SCALED_ACTIVATIONS.get(self.model.source.checkpoint.model_type, (None, None))
                self._known[kind_of(block)] = find_folds(
                    self.model, index, block, groups, hidden=sample, activation=activation
                )
            folds = self._known[kind_of(block)]
            weights = {
                linear.local: self.model.stored_weight(index, linear) for group in groups for linear in group.linears
            }
        for branch in branches:
            with self.reporter.stage("solve"), torch.inference_mode():
                scaled = self._scale(index, groups, folds, weights, _parameters(branch))
            for group in groups:
                self._solve_group(index, group, weights, scaled, branch)
            with self.reporter.stage("write"):
                self._write_rest(index, scaled, branch)

    def _scale(
        self,
        index: int,
        groups: list[InputStatistics],
        folds: Folds,
        weights: dict[str, torch.Tensor],
        parameters: AwqParameters,
    ) -> _Scaled:
        """Search the scales of every group and divide the operations before by them."""
        scaled = _Scaled()
        for group in groups:
            leader = group.linears[0].local
            fold = folds[leader]
            scaled.producers[leader], scaled.ratios[leader] = None, 0.0
            scaled.columns[leader] = torch.ones(group.hessian.shape[0], device=group.hessian.device)
            if fold is None:
                continue
            stacked = torch.cat([weights[linear.local] for linear in group.linears])
            try:
                found = search_scales(stacked, group.hessian, parameters, fold.rows.to(stacked.device))
            except SolveError as error:
                raise SolveError(f"{self.model.checkpoint_name(index, leader)}: {error}") from None
            producer = (
                f"{self.table.prefix}{index}.{fold.producer}"
                if fold.activation
                else self.model.checkpoint_name(index, fold.producer)
            )
            scaled.producers[leader], scaled.ratios[leader] = producer, found.ratio
            scaled.columns[leader] = self._divide(fold, producer, found, weights, scaled)
        return scaled

    def _divide(
        self,
        fold: Fold,
        producer: str,
        found: Scales,
        weights: dict[str, torch.Tensor],
        scaled: _Scaled,
    ) -> torch.Tensor:
        """Note what the producer is divided by; returns what the columns have to be multiplied by, [K]."""
        rows, device = fold.rows.to(found.scale.device), found.scale.device
        if fold.activation:
            stored = found.scale.half()
            scaled.stored[f"{producer}.scales"] = stored
            return stored.to(found.scale.dtype)
        if not fold.norm:
            weight = weights[fold.producer]
            outputs = torch.ones(len(weight), device=device)
            outputs[rows] = found.scale
            outputs = no_smaller_than_half(weight, outputs, awq_format.BITS)
            # another part of a fused projection may have been divided already
            scaled.rows[fold.producer] = scaled.rows.get(fold.producer, torch.ones_like(outputs)) * outputs
            return outputs[rows]
        name = f"{producer}.weight"
        weight = (scaled.stored[name] if name in scaled.stored else self.model.read(name)).to(device)
        outputs = torch.ones(len(weight), device=device)
        outputs[rows] = found.scale
        scaled.stored[name], real = divided(weight, outputs, fold.plus_one)
        if (name := f"{producer}.bias") in self.model.source.checkpoint.tensors:
            bias = (scaled.stored[name] if name in scaled.stored else self.model.read(name)).to(device)
            scaled.stored[name] = (bias.to(real) / real).to(bias.dtype)
        return real[rows]

    def _solve_group(
        self,
        index: int,
        group: InputStatistics,
        weights: dict[str, torch.Tensor],
        scaled: _Scaled,
        branch: Branch,
    ) -> None:
        leader = group.linears[0].local
        names = [self.model.checkpoint_name(index, linear.local) for linear in group.linears]
        columns = scaled.columns[leader]
        with self.reporter.stage("solve"), torch.inference_mode():
            parts = [
                weights[linear.local] / scaled.rows[linear.local][:, None]
                if linear.local in scaled.rows
                else weights[linear.local]
                for linear in group.linears
            ]
            stacked = torch.cat(parts)
            energy = energy_of(stacked, group.hessian)
            try:
                solution = quantize_scaled(
                    stacked, group.hessian, columns, _parameters(branch), self.section.rtn_fallback
                )
            except SolveError as error:
                raise SolveError(
                    f"{', '.join(names)}: {error}; calibrate on more or other text, raise awq.damp_percent, or set "
                    "awq.rtn_fallback to round such modules to nearest"
                ) from None
        first = 0
        for linear, name, part in zip(group.linears, names, parts, strict=True):
            rows = slice(first, first + len(part))
            with self.reporter.stage("pack"), no_products():
                tensors = awq_format.encode(solution.codes[rows], solution.scales[:, rows], solution.zeros[:, rows])
            with self.reporter.stage("write"):
                if f"{name}.bias" in self.model.source.checkpoint.tensors:
                    bias = self.model.read(f"{name}.bias").float()
                    if linear.local in scaled.rows:
                        bias = bias / scaled.rows[linear.local].cpu()
                    tensors["bias"] = half_bias(bias, name)
                branch.write(name, tensors)
            branch.record(
                name,
                solution,
                rows,
                energy=energy,
                tokens=group.tokens,
                scale_ratio=scaled.ratios[leader],
                scale_folded_into=scaled.producers[leader],
            )
            first = rows.stop

    def _write_rest(self, index: int, scaled: _Scaled, branch: Branch) -> None:
        """Everything of the block that is no linear: divided, or as it was."""
        for name in self.table.beside_linears(self.model.source.checkpoint, index):
            branch.writer.write(name, scaled.stored[name] if name in scaled.stored else self.model.read(name))
        inside = f"{self.table.prefix}{index}."
        for name, length in self.table.activation_scales(self.model.source.checkpoint.model_type).items():
            if name.startswith(inside):
                branch.writer.write(name, scaled.stored.get(name, torch.ones(length, dtype=torch.float16)))


def _parameters(branch: Branch) -> AwqParameters:
    return AwqParameters(**branch.item.variant.model_dump(exclude={"branch", "engine"}))
