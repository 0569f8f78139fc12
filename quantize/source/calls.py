"""How a model calls its blocks: arguments beside the hidden states, what a block returns, and stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BATCH, LENGTH = 5, 7
"""Of a trial's tokens: two sizes by which the dimensions of the hidden states are recognized."""

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
Replacement = Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Returns:
    """What a block returns: the hidden states alone, or at place 0 of a sequence.

    Attributes:
        container: tuple or list; None for a tensor. others: what stands beside the hidden states.
    """

    container: type | None = None
    others: tuple[Any, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Returns:
        """Read the form of a block's output.

        Raises:
            TypeError: it is neither a tensor nor a sequence that begins with one.
        """
        if isinstance(output, torch.Tensor):
            return cls()
        if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
            return cls(list if isinstance(output, list) else tuple, tuple(output[1:]))
        raise TypeError(f"a block returns a {type(output).__name__}")

    def wrap(self, hidden: torch.Tensor) -> Any:
        """The output of a block with these hidden states."""
        return hidden if self.container is None else self.container((hidden, *self.others))


@dataclass(frozen=True)
class HiddenLayout:
    """Which dimensions of the hidden states are windows and positions.

    Outside the model they are [batch, length, width], whatever else a model keeps in them (copies, streams).
    """

    batch: int = 0
    length: int = 1
    dimensions: int = 3

    @classmethod
    def of(cls, hidden: torch.Tensor) -> HiddenLayout:
        """Read it from hidden states of ``BATCH`` windows of ``LENGTH`` tokens."""
        shape = list(hidden.shape)
        return cls(shape.index(BATCH), shape.index(LENGTH), len(shape))

    def pack(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's form -> [batch, length, width]."""
        if self.dimensions == 3 and not self.batch:
            return hidden
        return hidden.movedim((self.batch, self.length), (0, 1)).flatten(2)

    def unpack(self, states: torch.Tensor, like: torch.Size) -> torch.Tensor:
        """[batch, length, width] -> the model's form; ``like`` is the shape of any batch in that form."""
        if self.dimensions == 3 and not self.batch:
            return states
        rest = [size for place, size in enumerate(like) if place not in (self.batch, self.length)]
        parted = states.reshape(*states.shape[:2], *rest)
        return parted.movedim((0, 1), (self.batch, self.length)).contiguous()


class HandedOn:
    """What blocks leave for later blocks of the same windows in mappings that all of them are given.

    In Gemma 3n and 4 these are keys and values, which the last blocks read instead of computing their own.
    """

    def __init__(self, contents: Mapping[str, Mapping[Any, Any]] | None = None) -> None:
        self._contents: dict[str, dict[Any, Any]] = {name: dict(one) for name, one in (contents or {}).items()}

    def copy(self) -> HandedOn:
        """An independent copy; the tensors are shared, since blocks replace and never change them."""
        return HandedOn(self._contents)

    def in_float32(self) -> HandedOn:
        """A copy whose tensors are float32."""

        def float32(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.float() if value.is_floating_point() else value
            return type(value)(map(float32, value)) if isinstance(value, list | tuple) else value

        return HandedOn(
            {name: {key: float32(value) for key, value in one.items()} for name, one in self._contents.items()}
        )

    @contextlib.contextmanager
    def given_to(self, keywords: Mapping[str, Any]) -> Iterator[None]:
        """Context of a block's call: its mappings hold what earlier blocks left, and what it adds is taken."""
        mappings = {name: value for name, value in keywords.items() if isinstance(value, MutableMapping)}
        saved = {name: dict(value) for name, value in mappings.items()}
        for name, value in mappings.items():
            value.update(self._contents.get(name, {}))
        yield
        for name, value in mappings.items():
            before = saved[name]
            left = {key: one for key, one in value.items() if key not in before or one is not before[key]}
            if left:
                self._contents[name] = left
            value.clear()
            value.update(before)


@dataclass(frozen=True)
class Calls:
    """How a model calls its blocks for a batch of windows.

    Attributes:
        blocks: arguments beside the hidden states, by block. shape: of the hidden states in the model's form.
        input_ids: the batch, [batch, length].
    """

    blocks: Mapping[int, BlockCall]
    shape: torch.Size
    input_ids: torch.Tensor

    def are_of(self, input_ids: torch.Tensor) -> bool:
        """Whether they were recorded with these tokens."""
        return self.input_ids.shape == input_ids.shape and torch.equal(self.input_ids, input_ids)


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a module computes something else."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def replaced_blocks(blocks: nn.ModuleList, returns: Sequence[Returns], replacement: Replacement) -> Iterator[None]:
    """Context in which the blocks return the hidden states that ``replacement`` gives, in their usual form."""
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):

            def forward(*arguments: Any, _index: int = index, **keywords: Any) -> Any:
                return returns[_index].wrap(replacement(_index, arguments, keywords))

            stack.enter_context(replaced_forward(block, forward))
        yield


def split_call(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[torch.Tensor, BlockCall]:
    """The hidden states of a block's call, and its other arguments."""
    rest = dict(keywords)
    if arguments:
        return arguments[0], (tuple(arguments[1:]), rest)
    name = "hidden_states" if "hidden_states" in rest else next(iter(rest))
    hidden: torch.Tensor = rest.pop(name)
    return hidden, ((), {"": name, **rest} if name != "hidden_states" else rest)


def equal_calls(left: Any, right: Any) -> bool:
    """Whether two calls, or parts of calls, have the same values."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(equal_calls(left[k], right[k]) for k in left)
        )
    if isinstance(left, list | tuple):
        return isinstance(right, list | tuple) and len(left) == len(right) and all(map(equal_calls, left, right))
    return left is right or isinstance(left, type(right)) or left == right
