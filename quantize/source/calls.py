"""How a model calls its blocks: arguments beside the hidden states, what a block returns, and stand-ins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

BATCH, LENGTH = 5, 7
"""Of a trial's tokens: two sizes by which the dimensions of the hidden states are recognized."""

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]
Origin = tuple[int, int]
"""Of a tensor that a block returns beside the hidden states: the block, and the place among its others."""
Links = dict[int | str, Origin]
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

    In Gemma 3n and 4 these are keys and values, which the last blocks read instead of computing their own. It also
    holds what blocks return beside the hidden states for a later block's arguments, such as the states of a router.
    """

    RETURNED = ""
    """Where tensors are held that blocks returned; no argument has this name."""

    def __init__(self, contents: Mapping[str, Mapping[Any, Any]] | None = None) -> None:
        self._contents: dict[str, dict[Any, Any]] = {name: dict(one) for name, one in (contents or {}).items()}

    def linked(self, call: BlockCall, links: Links) -> BlockCall:
        """A copy of a block's call, with the arguments that earlier blocks returned for these windows."""
        arguments, keywords = list(call[0]), dict(call[1])
        for key, origin in links.items():
            value = self._contents[self.RETURNED][origin]
            if isinstance(key, int):
                arguments[key] = value
            else:
                keywords[key] = value
        return tuple(arguments), keywords

    def keep(self, index: int, output: Any, readers: Mapping[Origin, int]) -> None:
        """Hold what block ``index`` returned for later blocks, and nothing that only earlier ones read."""
        held = self._contents.setdefault(self.RETURNED, {})
        for block, place in readers:
            if block == index:
                held[block, place] = output[1 + place]
        for origin in [one for one in held if readers[one] < index]:
            del held[origin]

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


def equal_calls(left: Any, right: Any, seen: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether two calls, or parts of calls, have the same values.

    Numbers and strings are compared by value like tensors, since one of them may depend on the tokens, such as the
    length of a window without its padding; objects by their attributes, functions by their code and what they hold.
    Whatever cannot be compared is unequal, so that the calls are recorded anew for every batch.
    """
    pair = (id(left), id(right))
    if left is right or pair in seen:
        return True
    if type(left) is not type(right):
        return False
    seen = seen | {pair}
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(equal_calls(left[key], right[key], seen) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal_calls(*both, seen) for both in zip(left, right, strict=True))
    if isinstance(left, float) and left != left:
        return bool(right != right)
    return _equal_values(left, right, seen)


def _equal_values(left: Any, right: Any, seen: frozenset[tuple[int, int]]) -> bool:
    """Compare two objects of one type that are no containers."""
    if isinstance(left, FunctionType):
        mine, other = ([cell.cell_contents for cell in one.__closure__ or ()] for one in (left, right))
        return left.__code__ is right.__code__ and equal_calls(mine, other, seen)
    if isinstance(left, MethodType):
        return left.__func__ is right.__func__ and equal_calls(left.__self__, right.__self__, seen)
    if isinstance(left, partial):
        first, second = ((one.func, one.args, one.keywords) for one in (left, right))
        return equal_calls(first, second, seen)
    compares: Any = type(left).__eq__
    if compares is object.__eq__ or is_dataclass(left):  # those of dataclasses fail on tensors
        return hasattr(left, "__dict__") and equal_calls(vars(left), vars(right), seen)
    try:
        return bool(np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right)
    except (TypeError, ValueError, RuntimeError):
        return False
