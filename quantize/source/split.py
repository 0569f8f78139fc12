"""Replace modules of stacked experts by plain linears, and find their tensors in the checkpoint.

A checkpoint stores experts one by one, which transformers' own table of conversions stacks when it loads them, or
stacked, and then each linear is a slice of a stored tensor. ``source/expert_forms.py`` says what a stacked module
computes; no architecture is named here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantize.formats.tensors import TensorSpec
from quantize.source.converted import conversions
from quantize.source.expert_forms import Form, experts_of, form_of
from quantize.source.experts import Experts
from quantize.source.routing import expert_of
from quantize.source.slices import Slice

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of MXFP4 tensors, after the name of the parameter that they hold."""

_APART = re.compile(r"^(?P<base>.+)\.\d+\.(?P<leaf>gate_proj|up_proj|down_proj|linear)\.weight$")
_HOLDERS = {
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "linear": ("weight",),
}
"""Names that slices of stacked parameters get, and what the parameters are called."""


@dataclass(frozen=True)
class Split:
    """What became of stacked experts.

    Attributes:
        names: tensor by parameter of linears that are slices. slices: by tensor.
    """

    names: dict[str, str] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)


def split_experts(model: Any, stored: Mapping[str, TensorSpec]) -> Split:
    """Replace every module of stacked experts by :class:`quantize.source.experts.Experts` on the meta device.

    Args:
        model: a transformers model on the meta device. stored: the checkpoint's tensors.

    A module that computes anything other than ``down(gate(first(x)))`` is not replaced.
    """
    split = Split()
    forms = {owner: form for owner, module in model.named_modules() if (form := form_of(module)) is not None}
    if not forms:
        return split
    single, stacked, apart = _single(model, stored), _stacked(model, stored), _apart(model, stored)
    for owner, form in forms.items():
        if set(single.get(owner, {})) == {form.first, form.down} and not form.bias and not form.interleaved:
            leaves = single[owner]
            if len(leaves[form.first]) in (1, form.halves) and len(leaves[form.down]) == 1:
                module = model.get_submodule(owner)
                model.set_submodule(owner, experts_of(form, module, leaves[form.first], leaves[form.down][0]))
        elif f"{owner}.{form.first}" in stacked and f"{owner}.{form.down}" in stacked:
            _split_stored(model, owner, form, stored, stacked=stacked, split=split)
        elif f"{owner}.{form.first}" in apart and f"{owner}.{form.down}" in apart:
            _split_apart(model, owner, form, stored, apart=apart, split=split)
    rest = {owner: form for owner, form in forms.items() if not isinstance(model.get_submodule(owner), Experts)}
    if rest:
        _split_numbered(model, rest, stored, split)
    return split


def _split_numbered(model: Any, forms: Mapping[str, Form], stored: Mapping[str, TensorSpec], split: Split) -> None:
    """Replace modules whose experts transformers takes from a longer run of numbers, such as text before vision."""
    state, numbered = model.state_dict(), dict[str, list[list[str]]]()
    for group in conversions(model, stored):
        sources = [tensor for _, tensor in group.sources]
        if not all(map(expert_of, sources)):
            continue
        try:
            made = group.made_of(model, [torch.full((1, 1), float(place)) for place in range(len(sources))])
        except Exception:  # its own code, on tensors of another shape than it expects
            continue
        for name, places in made.items():
            if name in state and isinstance(places, torch.Tensor) and places.dim() == 3:
                numbered[name] = [[sources[int(place)] for place in row.flatten()] for row in places]
    for owner, form in forms.items():
        parts = [numbered.get(f"{owner}.{parameter}", []) for parameter in form.matrices]
        names = {
            f"{owner}.{number}.{tensor.split('.')[-2]}.weight": tensor
            for part in parts
            for number, tensors in enumerate(part)
            for tensor in tensors
        }
        whole = all(len(part) == form.count for part in parts) and len(names) == form.count * (1 + form.halves)
        if whole and not form.bias and not form.interleaved:
            first, (down,) = ([tensor.split(".")[-2] for tensor in part[0]] for part in parts)
            model.set_submodule(owner, experts_of(form, model.get_submodule(owner), first, down))
            split.names.update(names)


def _single(model: Any, stored: Mapping[str, TensorSpec]) -> dict[str, dict[str, list[str]]]:
    """Of experts stored one by one: by module, the linears that are stacked into each of its parameters, in order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if type(item) is WeightConverter]
    stacking = {
        pattern: place
        for item in converters
        if [type(step) for step in item.operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
        for place, pattern in enumerate(item.source_patterns)
    }
    state = model.state_dict()
    found: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in sorted(stored):
        expert = expert_of(tensor)
        if expert is not None:
            name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
            if pattern in stacking and name in state:
                owner, _, parameter = name.rpartition(".")
                found[owner][parameter][stacking[pattern]] = expert[2].removesuffix(".weight")
    return {
        owner: {parameter: [leaf for _, leaf in sorted(parts.items())] for parameter, parts in parameters.items()}
        for owner, parameters in found.items()
    }


def _stacked(model: Any, stored: Mapping[str, TensorSpec]) -> dict[str, tuple[str, str]]:
    """Stored tensors of stacked parameters: by parameter, the tensor, and that of its scales if it is MXFP4."""
    from quantize.source.architecture import match_names

    plain = {name: (tensor, "") for name, tensor in match_names(model, stored).items()}
    packed = {
        tensor.removesuffix(BLOCKS): tensor
        for tensor, spec in stored.items()
        if tensor.endswith(BLOCKS) and spec.dtype == "U8" and tensor.removesuffix(BLOCKS) + SCALES in stored
    }
    for name, base in match_names(model, packed).items():
        plain.setdefault(name, (packed[base], base + SCALES))
    return plain


def _apart(model: Any, stored: Mapping[str, TensorSpec]) -> dict[str, tuple[str, list[str]]]:
    """Stacked parameters whose linears are stored under the names that slices of them have, as releases store them.

    Returns:
        By parameter: what the linears' names begin with, and their names in an expert.
    """
    from quantize.source.architecture import match_names

    bases: dict[str, tuple[str, dict[str, None]]] = {}
    for tensor in stored:
        if found := _APART.match(tensor):
            leaf = found["leaf"]
            for parameter in _HOLDERS[leaf]:
                stem = f"{found['base']}.{parameter}"
                bases.setdefault(stem, (found["base"], {}))[1][leaf] = None
    order = {leaf: place for place, leaf in enumerate(_HOLDERS)}
    return {
        name: (bases[stem][0], sorted(bases[stem][1], key=lambda leaf: order[leaf]))
        for name, stem in match_names(model, bases).items()
    }


def _split_apart(
    model: Any,
    owner: str,
    form: Form,
    stored: Mapping[str, TensorSpec],
    *,
    apart: Mapping[str, tuple[str, list[str]]],
    split: Split,
) -> None:
    """Replace a module whose linears are stored one by one under the names of slices."""
    names, leaves = {}, {}
    for parameter in form.matrices:
        base, members = apart[f"{owner}.{parameter}"]
        plain = [part.leaf for part in _parts(parameter, form, ".weight" if members == ["linear"] else "")]
        leaves[parameter] = plain
        for number in range(form.count):
            for leaf, member in zip(plain, members if len(members) == len(plain) else [], strict=False):
                for kind in ("weight", "bias") if form.bias else ("weight",):
                    names[f"{owner}.{number}.{leaf}.{kind}"] = f"{base}.{number}.{member}.{kind}"
    if len(names) == form.count * sum(map(len, leaves.values())) * (2 if form.bias else 1) and all(
        tensor in stored for tensor in names.values()
    ):
        module = model.get_submodule(owner)
        model.set_submodule(owner, experts_of(form, module, leaves[form.first], leaves[form.down][0]))
        split.names.update(names)


@dataclass(frozen=True)
class _Part:
    """One linear of every expert, inside a stacked tensor.

    Attributes:
        leaf: its name in the expert. start, step, count: which outputs of the stacked parameter it has. inputs: its K.
    """

    leaf: str
    start: int
    step: int
    count: int
    inputs: int


def _split_stored(
    model: Any,
    owner: str,
    form: Form,
    stored: Mapping[str, TensorSpec],
    *,
    stacked: Mapping[str, tuple[str, str]],
    split: Split,
) -> None:
    """Replace a module whose parameters are stored stacked, if its tensors have the expected shapes."""
    module = model.get_submodule(owner)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    parts = {parameter: _parts(parameter, form, stacked[f"{owner}.{parameter}"][0]) for parameter in form.matrices}
    names, slices = {}, {}
    for parameter, members in parts.items():
        tensor, scales = stacked[f"{owner}.{parameter}"]
        turned = _is_turned(tuple(stored[tensor].shape), shapes[parameter], form.transposed, bool(scales))
        bias = stacked.get(f"{owner}.{parameter}_bias", ("", ""))[0] if form.bias else None
        if turned is None or bias == "":
            return
        base = _base(tensor, parameter)
        for part in members:
            for number in range(form.count):
                stem = f"{base}.{number}.{'linear' if tensor.endswith('.weight') else part.leaf}"
                inside = f"{owner}.{number}.{part.leaf}"
                cut = (part.start, part.step, part.count)
                names[f"{inside}.weight"] = f"{stem}.weight"
                shape = (part.count, part.inputs)
                slices[f"{stem}.weight"] = Slice(tensor, number, turned, *cut, shape, scales)
                if bias:
                    names[f"{inside}.bias"] = f"{stem}.bias"
                    slices[f"{stem}.bias"] = Slice(bias, number, False, *cut, (part.count,))
    first, (down,) = parts[form.first], parts[form.down]
    model.set_submodule(owner, experts_of(form, module, [part.leaf for part in first], down.leaf))
    split.names.update(names)
    split.slices.update(slices)


def _parts(parameter: str, form: Form, tensor: str) -> list[_Part]:
    """The linears in a stacked parameter. A tensor that is stored as a module's weight stays one linear."""
    if parameter == form.down:
        return [_Part(form.down, 0, 1, form.width, form.inner)]
    if form.halves == 1 or (tensor.endswith(".weight") and not form.interleaved):
        return [_Part(form.first, 0, 1, form.halves * form.inner, form.width)]
    step = 2 if form.interleaved else 1
    starts = {"gate_proj": 0, "up_proj": 1 if form.interleaved else form.inner}
    return [_Part(leaf, start, step, form.inner, form.width) for leaf, start in starts.items()]


def _base(tensor: str, parameter: str) -> str:
    """What the names of slices begin with: the experts' module, or the module whose weight is stacked."""
    return tensor.removesuffix(BLOCKS).removesuffix(".weight").removesuffix(f".{parameter}")


def _is_turned(stored: tuple[int, ...], shape: tuple[int, ...], transposed: bool, packed: bool) -> bool | None:
    """Whether a tensor is stacked as [in_features, out_features]; None if it does not fit the parameter.

    MXFP4 blocks are always [experts, out_features, groups, 16].
    """
    if packed:
        outputs, inputs = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        return False if stored == (shape[0], outputs, inputs // 32, 16) else None
    if stored == shape:
        return transposed
    return not transposed if stored == (shape[0], shape[2], shape[1]) else None
