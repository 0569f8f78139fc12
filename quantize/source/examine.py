"""What transformers makes of a checkpoint, found on the meta device: the one answer that plan and build share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.errors import SourceError
from quantize.formats.tensors import TensorSpec
from quantize.source.anatomy import ROUTER, UNREACHED, Anatomy, Found
from quantize.source.architecture import match_names, missing_parameters, tied_parameters
from quantize.source.blocks import Trial, find_blocks, other_towers, try_blocks
from quantize.source.checkpoint import Checkpoint, with_slices
from quantize.source.converted import hold_as_stored
from quantize.source.experts import Experts
from quantize.source.routing import find_routers
from quantize.source.slices import Slice
from quantize.source.split import split_experts

UNCALLED = "its weight is read by other code, so no loader can replace it"


@dataclass(frozen=True)
class Examined:
    """A model on the meta device, and its parts.

    Attributes:
        tensors: of the checkpoint, with slices in place of stacked ones. names: checkpoint tensor by parameter or
            buffer. prefix: of the blocks in the model. towers: prefixes of modules that do not take part in generating
            text.
    """

    model: Any
    tensors: Mapping[str, TensorSpec]
    names: Mapping[str, str]
    prefix: str
    blocks: nn.ModuleList
    trial: Trial
    towers: tuple[str, ...]
    slices: Mapping[str, Slice]

    def is_outside_text(self, name: str) -> bool:
        """Whether a parameter belongs to a tower that text does not reach."""
        return name.startswith(self.towers)

    @cached_property
    def unreached(self) -> frozenset[int]:
        """Blocks that the model does not run on text alone."""
        return frozenset() if self.trial.failure else frozenset(range(len(self.blocks))) - set(self.trial.order)

    def reason(self, block: int, local: str) -> str:
        """Why a linear of a block has to stay as it is; empty if it can be quantized."""
        if self.names[f"{self.prefix}{block}.{local}.weight"] in self._routers or local in self._scores[block]:
            return ROUTER
        if block in self.unreached or local.startswith(self.trial.unreached.get(block, ())):
            return UNREACHED
        return UNCALLED if local in self.trial.uncalled.get(block, ()) else ""

    def linears(self, block: int) -> list[tuple[str, nn.Module]]:
        """Linears of a block with a weight of their own in the checkpoint, by name in the block, in module order."""
        return [
            (local, module)
            for local, module in self.blocks[block].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and self.names.get(f"{self.prefix}{block}.{local}.weight", "").endswith(".weight")
        ]

    @cached_property
    def _scores(self) -> list[frozenset[str]]:
        """By block, names of linears beside experts with an output for each of them."""
        return [_scores_of(block) for block in self.blocks]

    @cached_property
    def _routers(self) -> frozenset[str]:
        return find_routers(self.tensors)

    def anatomy(self) -> Anatomy:
        """The same as plain data."""
        inside = {
            stored: int(name[len(self.prefix) :].partition(".")[0])
            for name, stored in self.names.items()
            if name.startswith(self.prefix)
        }
        linears = []
        for block in range(len(self.blocks)):
            for local, module in self.linears(block):
                name = self.names[f"{self.prefix}{block}.{local}.weight"].removesuffix(".weight")
                reason = self.reason(block, local)
                linears.append(Found(name, block, local, isinstance(module, Conv1D), reason))
        read = set(self.names.values())
        unread = sorted(name for name in self.tensors if name not in read)
        beside = self._linears_outside()
        stored = {self.names[f"{name}.weight"] for name in beside if f"{name}.weight" in self.names}
        prefix = self.stored_prefix
        modules = [name.removesuffix(".weight") for name in (*stored, *unread) if len(self.tensors[name].shape) > 1]
        return Anatomy(
            type(self.model).__name__,
            len(self.blocks),
            prefix,
            tuple(linears),
            inside,
            tuple(unread),
            tuple(sorted(stored)),
            tuple(sorted({*shortest(modules, prefix), *shortest(beside, self.prefix)})),
            self.slices,
            prefix != self.prefix,
        )

    def _linears_outside(self) -> list[str]:
        """Names of modules with matrices outside the blocks, without embeddings and the output head."""
        head = self.model.get_output_embeddings()
        return [
            name
            for name, module in self.model.named_modules()
            if not name.startswith(self.prefix)
            and module is not head
            and not isinstance(module, nn.Embedding)
            and isinstance(weight := getattr(module, "weight", None), torch.Tensor)
            and weight.dim() > 1
        ]

    @cached_property
    def stored_prefix(self) -> str:
        """What most of the checkpoint's names of blocks begin with, as in ``model.layers.``; empty if none do."""
        found: Counter[str] = Counter()
        for name, stored in self.names.items():
            if name.startswith(self.prefix):
                index, parts = name[len(self.prefix) :].partition(".")[0], stored.split(".")
                if index in parts:
                    found["".join(f"{part}." for part in parts[: parts.index(index)])] += 1
        return found.most_common(1)[0][0] if found else ""


def _scores_of(block: nn.Module) -> frozenset[str]:
    counts = {name: {len(one), one.numbers} for name, one in block.named_modules() if isinstance(one, Experts)}
    found = set()
    for mixture, count in counts.items():
        beside = mixture.rpartition(".")[0]
        for local, module in block.named_modules():
            inside = local.startswith(f"{beside}.") if beside else "router" in local
            if inside and not local.startswith(f"{mixture}.") and isinstance(module, nn.Linear):
                found |= {local} if module.out_features in count else set()
    return frozenset(found)


def shortest(names: Iterable[str], blocks: str) -> set[str]:
    """The shortest beginnings of dotted names that do not lead to the blocks too.

    Args:
        blocks: what the names of the blocks begin with, as in ``model.layers.``
    """
    found = set()
    for name in names:
        parts = name.split(".")
        starts = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        found.add(next((start for start in starts if not blocks.startswith(f"{start}.")), name))
    return found


def examine(model: Any, tensors: Mapping[str, TensorSpec], named: str) -> Examined:
    """Find blocks, names and the form of calls of a model on the meta device; its stacked experts are split.

    Raises:
        SourceError: the checkpoint does not fit the model, or the model cannot be run block by block.
    """
    split = split_experts(model, tensors)
    found = find_blocks(model)
    if found is None:
        raise SourceError(f"{named}: {type(model).__name__} has no list of decoder blocks")
    prefix, blocks = found
    towers = tuple(f"{name}." for name in other_towers(model, blocks))
    names = {**match_names(model, tensors), **split.names}
    if changed := hold_as_stored(model, tensors, names, towers):
        names = {**match_names(model, tensors), **split.names, **changed}
    seen = with_slices(Checkpoint({}, tensors), split.slices).tensors
    one = Examined(model, seen, names, prefix, blocks, try_blocks(model, blocks), towers, split.slices)
    _check_tensors(one, named)
    _check_calls(one, named)
    return one


def _check_tensors(one: Examined, named: str) -> None:
    shared = [name for name in tied_parameters(one.model) if name.startswith(one.prefix) and name not in one.names]
    if shared:
        raise SourceError(
            f"{named}: blocks of {type(one.model).__name__} share weights ({shared[0]}), which is not supported; its "
            "blocks cannot be taken one by one"
        )
    missing = [name for name in missing_parameters(one.model, one.names) if not one.is_outside_text(name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{named}: the checkpoint lacks the tensor {missing[0]}{more}, which "
            f"{type(one.model).__name__} of transformers needs{_hint(one)}"
        )
    for name, parameter in one.model.named_parameters():
        stored = one.names.get(name)
        if stored is None or one.is_outside_text(name):
            continue
        shape, dtype = tuple(one.tensors[stored].shape), one.tensors[stored].dtype
        if parameter.is_floating_point() and not dtype.startswith(("F", "BF")):
            raise SourceError(
                f"{named}: the model is already quantized ({stored} is {dtype}, {type(one.model).__name__} has "
                "floating-point numbers there); name the unquantized model instead"
            )
        if shape != tuple(parameter.shape):
            raise SourceError(
                f"{named}: {name} is {list(shape)} in the checkpoint, but the config requires {list(parameter.shape)}"
            )


def _hint(one: Examined) -> str:
    """What the checkpoint has instead."""
    read = set(one.names.values())
    other = sorted(name for name in one.tensors if name not in read)
    return f"; it has {other[0]} and {len(other) - 1} others that are not read" if len(other) > 1 else ""


def _check_calls(one: Examined, named: str) -> None:
    trial, count = one.trial, len(one.blocks)
    kind = type(one.model).__name__
    if trial.failure:
        return  # real weights decide, when the build begins
    if len(set(trial.order)) != len(trial.order) or trial.order != sorted(trial.order):
        raise SourceError(
            f"{named}: {kind} runs its {count} blocks of '{one.prefix}N' more than once or out of order, which is not "
            "supported; its blocks cannot be taken one by one"
        )
    if trial.handed_on:
        raise SourceError(
            f"{named}: blocks of {kind} hand on more than hidden states, which is not supported; its blocks cannot be "
            "taken one by one"
        )
