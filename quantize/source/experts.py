"""Mixtures of experts with one linear for every projection of every expert, as in checkpoints.

transformers 5 stacks the experts of a block into three-dimensional parameters when it loads a checkpoint. Here each
such module is replaced by one with plain linears under the checkpoint's names, so that loading, statistics, solving
and measuring treat them like all others. The modules and their stacked parameters are found in transformers' own table
of conversions; no architecture is named here.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quantize.source.routing import expert_of

Gate = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``, with its linears under the checkpoint's names.

    Attributes:
        tokens: indices, ascending, of the rows of the mixture's input in the last call, int64 [rows].
        outer: the linear that reads the gated product; the others read the expert's input.
    """

    def __init__(self, inner: dict[str, nn.Linear], outer: dict[str, nn.Linear], gate: Gate) -> None:
        super().__init__()
        for name, linear in (inner | outer).items():
            self.add_module(name, linear)
        self._inner, self._outer, self._gate = tuple(inner), next(iter(outer)), gate
        self.tokens = torch.empty(0, dtype=torch.int64)

    @property
    def outer(self) -> nn.Module:
        return self.get_submodule(self._outer)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [rows, width] -> [rows, width]."""
        # the inner linears get the same tensor object, by which statistics recognize their shared input
        hidden = torch.cat([self.get_submodule(name)(rows) for name in self._inner], dim=-1)
        output: torch.Tensor = self.outer(self._gate(hidden))
        return output


class Experts(nn.ModuleList):
    """The experts of one block, with the call signature of transformers' stacked module.

    Experts run in order and add to the output in that order; an expert without tokens does not run.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states`` [tokens, width]; expert numbers and their weights, [tokens, k] -> [tokens, width]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            assert isinstance(expert, Expert)
            tokens, choice = torch.where(top_k_index == number)
            expert.tokens = tokens
            if len(tokens):
                rows = expert(hidden_states[tokens]) * top_k_weights[tokens, choice, None]
                output.index_add_(0, tokens, rows.to(output.dtype))
        return output


@contextlib.contextmanager
def pinned_routing(block: nn.Module) -> Iterator[None]:
    """Context in which every run of a block routes its tokens like the first run, with the same weights.

    For comparing runs that should be equal: rounding alone can change a close choice of the router.
    """
    chosen: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def pin(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return arguments[0], *chosen.setdefault(module, arguments[1:])

    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, Experts):
                stack.callback(module.register_forward_pre_hook(pin).remove)
        yield


def split_experts(model: Any, stored: Iterable[str]) -> None:
    """Replace every module of stacked experts by :class:`Experts` on the meta device.

    Args:
        model: a transformers model. stored: names of the checkpoint's tensors.

    A module that computes anything other than ``down(gate(inner(x)))``, or has biases, is not replaced; loading its
    block then reports missing tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if type(item) is WeightRenaming]
    converters = [item for item in mapping if type(item) is WeightConverter]
    stacking = {
        pattern: place
        for item in converters
        if [type(step) for step in item.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        for place, pattern in enumerate(item.source_patterns)
    }
    state = model.state_dict()
    found: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in stored:
        expert = expert_of(tensor)
        if expert is not None:
            name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
            if pattern in stacking and name in state:
                owner, _, parameter = name.rpartition(".")
                found[owner][parameter][stacking[pattern]] = expert[2].removesuffix(".weight")
    for owner, parameters in found.items():
        leaves = {parameter: [leaf for _, leaf in sorted(parts.items())] for parameter, parts in parameters.items()}
        if experts := _split(model.get_submodule(owner), leaves):
            model.set_submodule(owner, experts)


def _split(stacked: nn.Module, leaves: dict[str, list[str]]) -> Experts | None:
    """The experts of one module; ``leaves`` are the linears stacked into each of its parameters, in order."""
    plain = getattr(stacked, "has_gate", False) and not any(
        getattr(stacked, name, False) for name in ("has_bias", "has_post_expert_norm", "is_transposed")
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in stacked.named_parameters()}
    if not plain or set(shapes) != {"gate_up_proj", "down_proj"} or set(leaves) != set(shapes):
        return None
    count, twice, width = shapes["gate_up_proj"]
    inner, (outer,) = leaves["gate_up_proj"], leaves["down_proj"]
    dtype = next(stacked.parameters()).dtype
    gate: Any = stacked._apply_gate

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)

    return Experts(
        Expert(
            {name: linear(width, twice // len(inner)) for name in inner},
            {outer: linear(twice // len(inner), width)},
            gate,
        )
        for _ in range(count)
    )
