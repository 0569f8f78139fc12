"""Which blocks of a model are alike: what is found on one of them by experiment then holds for the others."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

_PLACE = re.compile(r"^_*((layer|block)_?(idx|id|index|num|number)|idx|index)$")
"""Names of attributes that say which block it is; they differ in every block and change nothing in it."""


def kind_of(block: nn.Module) -> Hashable:
    """A key that blocks share if their modules have equal names, types, shapes and settings.

    Settings are what the constructors stored beside parameters: flags, sizes, names, activation functions. Blocks of
    one class can differ in them alone, such as in their number of heads, their window, or whose keys they use.
    Of a fraction (an epsilon, a multiplier) only the sign counts.
    """
    return tuple((name, type(module), *_state(module)) for name, module in block.named_modules())


def _state(module: nn.Module) -> tuple[Hashable, ...]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in own)
    settings = tuple(
        (name, described)
        for name, value in sorted(vars(module).items())
        if not _PLACE.match(name) and name != "training" and (described := _described(value)) is not None
    )
    return shapes, settings


def _described(value: Any) -> Hashable:
    """A value as a part of a key; None for what does not say how a module computes."""
    if isinstance(value, bool | int | str | torch.dtype):
        return type(value).__name__, str(value)
    if isinstance(value, float):
        return "fraction", (value > 0) - (value < 0)
    if isinstance(value, list | tuple):
        return tuple(_described(item) for item in value)
    if isinstance(value, functools.partial):
        return _described(value.func), _described(value.args), tuple(sorted(value.keywords))
    if isinstance(value, types.MethodType):
        owner = value.__self__
        return value.__qualname__, *(_state(owner) if isinstance(owner, nn.Module) else ())
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return value.__module__, value.__qualname__
    return None
