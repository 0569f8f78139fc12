"""Hold parameters as the checkpoint stores them where transformers merges, splits or turns tensors on loading.

transformers' own table of conversions says which. Linears that it concatenates stay linears of their own, under their
own names, so that each is quantized and stored as in the checkpoint. Any other parameter is computed from the stored
tensors by transformers' own operations whenever it is used; every parameter then is one tensor of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from quantize.formats.tensor_file import DTYPES
from quantize.formats.tensors import TensorSpec
from quantize.source.routing import expert_of

LARGEST = 2**24
"""Elements of the largest parameter that is computed when it is used; what is larger has to be linears."""


@dataclass
class Group:
    """Stored tensors that one conversion takes, in its order.

    Attributes:
        name: the parameter that it makes, or the first of several. sources: its pattern and the tensor's name, each.
    """

    name: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)

    def made_of(self, model: Any, tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
        """What transformers makes of tensors in place of the sources, by parameter."""
        converter = deepcopy(self.converter)
        for (pattern, source), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.name, source, pattern, tensor)
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


class Concatenated(nn.Module):
    """Linears that read the same input, with one output after another."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` [..., in_features] -> [..., the sum of out_features]."""
        return torch.cat([linear(inputs) for linear in self.children()], dim=-1)


class _Made(nn.Module):
    """Parametrization: a parameter as transformers makes it of stored tensors."""

    def __init__(self, model: Any, group: Group, name: str, specs: list[TensorSpec]) -> None:
        super().__init__()
        self._model = (model,)  # a tuple hides it from torch
        self._group, self._name, self._specs = group, name, specs

    def __deepcopy__(self, memo: dict[int, Any]) -> _Made:
        return self  # it holds no parameters

    def forward(self, *stored: torch.Tensor) -> torch.Tensor:
        made = self._group.made_of(*self._model, stored)
        found: torch.Tensor = made[self._name]
        return found

    def right_inverse(self, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for one in self._specs)


def conversions(model: Any, stored: Iterable[str]) -> list[Group]:
    """The conversions that transformers would apply to these tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    if not converters:
        return []
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    state, groups = model.state_dict(), dict[str, Group]()
    for tensor in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            groups.setdefault(name, Group(name, by_pattern[pattern])).sources.append((pattern, tensor))
    return list(groups.values())


def hold_as_stored(
    model: Any, stored: Mapping[str, TensorSpec], names: Mapping[str, str], outside: tuple[str, ...] = ()
) -> dict[str, str]:
    """Change a model on the meta device so that what its table of conversions makes is held as it is stored.

    Args:
        names: tensor by parameter, of those that need no conversion. outside: beginnings of names that are left alone,
            such as those of towers.

    Returns:
        Tensor by parameter, of the parameters that took the place of others.
    """
    state = model.state_dict()
    if all(name in names or name.startswith(outside) for name in state):
        return {}
    found: dict[str, str] = {}
    for group in conversions(model, stored):
        if any(expert_of(tensor) for _, tensor in group.sources):
            continue  # linears, which ``source/split.py`` finds; what it leaves is reported as lacking
        specs = [stored[tensor] for _, tensor in group.sources]
        shapes = _shapes(model, group, specs)
        for name, shape in shapes.items():
            known = name not in state or name in names or name.startswith(outside)
            if known or tuple(state[name].shape) != shape:
                continue
            if _is_joined(model, group, name):
                found |= _join(model, group, name, specs)
            elif state[name].numel() <= LARGEST and state[name].is_floating_point():
                found |= _compute(model, group, name, specs)
    return found


def _shapes(model: Any, group: Group, specs: list[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a conversion makes; empty if these tensors do not fit it."""
    empty = [torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for one in specs]
    try:
        made = group.made_of(model, empty)
    except Exception:  # a part is lacking, or shaped otherwise: the parameter is then reported as lacking
        return {}
    return {name: tuple(one.shape) for name, one in made.items() if isinstance(one, torch.Tensor)}


def _is_joined(model: Any, group: Group, name: str) -> bool:
    """Whether a parameter is the weight of a linear that is several stored linears, one after another."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    operations = [(type(one).__name__, getattr(one, "dim", None)) for one in group.converter.operations]
    return (
        type(module) is nn.Linear
        and leaf == "weight"
        and module.bias is None
        and operations == [("Concatenate", 0)]
        and all(tensor.endswith(".weight") for _, tensor in group.sources)
    )


def _join(model: Any, group: Group, name: str, specs: list[TensorSpec]) -> dict[str, str]:
    owner = name.rpartition(".")[0]
    place = {pattern: order for order, pattern in enumerate(group.converter.source_patterns)}
    parts = sorted(zip(group.sources, specs, strict=True), key=lambda part: place[part[0][0]])
    dtype, linears, found = model.get_submodule(owner).weight.dtype, {}, {}
    for (_, tensor), spec in parts:
        leaf = tensor.split(".")[-2]
        outputs, inputs = spec.shape
        linears[leaf] = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)
        found[f"{owner}.{leaf}.weight"] = tensor
    model.set_submodule(owner, Concatenated(linears))
    return found


def _compute(model: Any, group: Group, name: str, specs: list[TensorSpec]) -> dict[str, str]:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    parametrize.register_parametrization(module, leaf, _Made(model, group, name, specs), unsafe=True)
    held = f"{owner}.parametrizations.{leaf}.original"
    tensors = [tensor for _, tensor in group.sources]
    return {f"{held}{number}": tensor for number, tensor in enumerate(tensors)}
