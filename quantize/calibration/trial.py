"""A block on trial: run again and again in float32 on drawn numbers, to see what a change in it reaches.

What a block computes is a matter of its code, not of its weights. Weights and states are therefore drawn: in a real
block a nonlinearity can hide, because what reaches it is so small that it looks linear, or because a channel is dead,
and the compute dtype or a norm behind it can hide the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.source.experts import Expert, Experts

TOLERANCE = 1e-4
"""Relative, for every channel. Scales are powers of two: what commutes with them is preserved to the last bit, except
where a norm adds one to its weight."""
ROWS = 512
"""Rows (tokens) of an input that are compared."""

Rows = list[torch.Tensor]


@contextlib.contextmanager
def drawn(block: nn.Module) -> Iterator[None]:
    """Context in which a block has drawn float32 weights; the same parameters and buffers are put back afterwards.

    Linears get normal weights of unit gain, norms weights between 1/2 and 3/2, biases small normal values. Everything
    else has its own values, in float32.
    """
    dice = torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack, torch.no_grad():
        known: dict[int, nn.Parameter] = {}
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    if id(parameter) not in known:
                        known[id(parameter)] = nn.Parameter(_drawn(module, name, parameter, dice), requires_grad=False)
                    stack.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = known[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    stack.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.float()
        yield


def _drawn(module: nn.Module, name: str, parameter: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
    if name == "weight" and parameter.dim() == 1:
        return torch.rand(parameter.shape, generator=dice).add_(0.5).to(parameter.device)
    if name == "weight" and parameter.dim() == 2 and isinstance(module, nn.Linear | Conv1D):
        rows, columns = parameter.shape
        inputs = rows if isinstance(module, Conv1D) else columns
        # every row is the row before, moved by one: as independent as the trial needs, in hardly any memory
        strip = torch.randn(rows + columns, generator=dice).div_(inputs**0.5).to(parameter.device)
        return strip.as_strided((rows, columns), (1, 1))
    if name == "bias" and parameter.dim() == 1:
        return torch.randn(parameter.shape, generator=dice).mul_(0.1).to(parameter.device)
    return parameter.float()


@contextlib.contextmanager
def replaced(module: nn.Module, **tensors: torch.Tensor) -> Iterator[None]:
    """Context in which parameters of a module have other values."""
    before = {name: module._parameters[name] for name in tensors}
    module._parameters.update({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
    try:
        yield
    finally:
        module._parameters.update(before)


@contextlib.contextmanager
def output_times(module: nn.Module, factor: torch.Tensor) -> Iterator[None]:
    """Context in which a module's output is multiplied by ``factor`` [n], if its last dimension is n."""

    def multiply(module: nn.Module, arguments: Any, output: Any) -> Any:
        fits = isinstance(output, torch.Tensor) and output.is_floating_point() and output.shape[-1:] == factor.shape
        return output * factor.to(output.device) if fits else output

    handle = module.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Seen:
    """What one run let see, in sampled rows [rows, channels].

    Attributes:
        inputs: by every module that weighs what it reads, the tensors that it was handed, call after call.
        results: what came out, and tensors in containers that the block was handed and could have changed.
    """

    inputs: dict[nn.Module, Rows] = field(default_factory=dict)
    results: Rows = field(default_factory=list)


class Trial:
    """A module to run again and again.

    Args:
        root: a block, or one expert, inside :func:`drawn`. run: runs it, always on the same input.
    """

    def __init__(self, root: nn.Module, run: Callable[[], Any]) -> None:
        self._root, self._run = root, run
        self._readers = list(_readers(root))
        self.before = self.observe()

    def observe(self) -> Seen:
        """Run it with whatever has been changed in it."""
        seen, handed = Seen(), []

        def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            handed.append((_as_float32(arguments), _as_float32(keywords)))
            return handed[-1]

        def read(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen.inputs.setdefault(module, []).extend(_sampled((arguments, keywords)))

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            seen.results += _sampled(output)

        with contextlib.ExitStack() as stack:
            stack.callback(self._root.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(self._root.register_forward_hook(leave).remove)
            for reader in self._readers:
                # before hooks that change the arguments, such as those that pin a router's choices
                hook = reader.register_forward_pre_hook(read, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            self._run()
        for arguments, keywords in handed:
            containers = [value for value in (*arguments, *keywords.values()) if isinstance(value, list | dict)]
            seen.results += _sampled(containers)
        return seen

    def is_preserved(self, seen: Seen, columns: Mapping[nn.Module, torch.Tensor]) -> bool:
        """Whether everything reads and gives what it did before any change.

        Args:
            columns: by module, what its input's channels were divided by, [K]; the others' inputs must be equal.
        """
        before = self.before
        if seen.inputs.keys() != before.inputs.keys():
            return False
        pairs: list[tuple[Rows, Rows, torch.Tensor | None]] = [(seen.results, before.results, None)]
        pairs += [(seen.inputs[reader], rows, columns.get(reader)) for reader, rows in before.inputs.items()]
        return all(
            len(now) == len(then)
            and all(
                is_same(one if factor is None else one * factor, other) for one, other in zip(now, then, strict=True)
            )
            for now, then, factor in pairs
        )


def is_same(now: torch.Tensor, then: torch.Tensor) -> bool:
    """Whether each channel of two samples [rows, channels] is the same; NaN and infinity never are."""
    if now.shape != then.shape:
        return False
    size = then.norm(dim=0)
    # channels that are much weaker than the others may have lost their last digits in sums with those
    floor = size.square().mean().sqrt() * 1e-3
    return bool(((now - then).norm(dim=0) <= TOLERANCE * (size + floor)).all())


def _readers(root: nn.Module) -> Iterator[nn.Module]:
    """Modules that compute with what they are handed: linears, convolutions, routers, mixtures. What an expert of a
    mixture reads is a part of what the mixture is handed."""
    if not isinstance(root, Expert):
        inside = {part for module in root.modules() if isinstance(module, Expert) for part in module.modules()}
    else:
        inside = set()
    for module in root.modules():
        if module in inside or module is root:
            continue
        weighs = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if weighs or isinstance(module, Experts):
            yield module


def _sampled(value: Any) -> Rows:
    """Rows of all floating-point tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not value.dim():
            return []
        rows = value.reshape(-1, value.shape[-1])
        return [rows[:: max(1, len(rows) // ROWS)][:ROWS].float().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [rows for item in value for rows in _sampled(item)] if isinstance(value, list | tuple) else []


def _as_float32(value: Any) -> Any:
    """A copy of a block's arguments, with float32 tensors for all floating-point ones."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float32, copy=True) if value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(map(_as_float32, value))
    return {key: _as_float32(item) for key, item in value.items()} if type(value) is dict else value
