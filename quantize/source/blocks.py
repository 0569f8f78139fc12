"""Where a model's decoder blocks are, and how the model calls them, found by running it once with stand-ins.

The run needs no weights: linears answer with small random numbers, and other parameters are constants that take no
memory. It shows what a block returns, which of its linears are called as modules (a loader cannot replace one whose
weight is read by other code), and whether the model calls its blocks once and in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantize.source.calls import (
    BATCH,
    LENGTH,
    BlockCall,
    HiddenLayout,
    Links,
    Origin,
    Returns,
    replaced_blocks,
    replaced_forward,
    split_call,
)
from quantize.source.experts import Experts

LARGEST = 2**24
"""Elements of a parameter with more than two dimensions above which its module is not run, and answers with zeros."""
SCALE = 0.02


@dataclass
class Trial:
    """What one run with stand-ins showed.

    Attributes:
        returns: of each block. layout: of the hidden states; shape: theirs in the trial.
        uncalled: by block, names of its linears that are never called as modules.
        unreached: by block, beginnings of the names of its experts that this run does not reach.
        order: indices of the blocks in the order in which they were called.
        fills: whether blocks leave something for later blocks in a mapping that all of them are given.
        links: by block, which of its arguments (a keyword, or a place after the hidden states) are what an earlier
            block returned beside the hidden states: that block, and the place among its others.
        handed_on: whether a block gets something from a block before it in any other way.
        failure: why the run failed, if it did; the rest is then unknown.
    """

    returns: list[Returns] = field(default_factory=list)
    layout: HiddenLayout = field(default_factory=HiddenLayout)
    shape: torch.Size = field(default_factory=lambda: torch.Size())
    uncalled: dict[int, frozenset[str]] = field(default_factory=dict)
    unreached: dict[int, tuple[str, ...]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    fills: bool = False
    links: dict[int, Links] = field(default_factory=dict)
    handed_on: bool = False
    failure: str = ""

    @cached_property
    def last_readers(self) -> dict[Origin, int]:
        """The last block that reads what a block returned beside the hidden states."""
        return {origin: index for index in sorted(self.links) for origin in self.links[index].values()}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The decoder's blocks and their name: of the lists of modules in the text tower the one with most parameters.

    Lists inside other lists (experts) and inside other towers are left out. None if there is no list.
    """
    decoder = _decoder(model)
    best: tuple[int, str, nn.ModuleList] | None = None
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(other) for other in inside):
            continue
        if name and isinstance(module, PreTrainedModel) and not _related(module, decoder):
            inside.append(f"{name}.")
        elif isinstance(module, nn.ModuleList) and len(module):
            inside.append(f"{name}.")
            size = sum(parameter.numel() for parameter in module.parameters())
            if best is None or size > best[0]:
                best = (size, f"{name}.", module)
    return best and best[1:]


def other_towers(model: nn.Module, blocks: nn.Module) -> list[str]:
    """Names of the models inside a model that do not contain its decoder's blocks, such as a vision tower."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and isinstance(module, PreTrainedModel) and not inside and not _related(module, blocks):
            found.append(name)
    return found


def _decoder(model: nn.Module) -> nn.Module:
    try:
        decoder = model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return model
    return decoder if isinstance(decoder, nn.Module) else model


def _related(left: nn.Module, right: nn.Module) -> bool:
    """Whether one of two modules is, or contains, the other."""
    return any(module is right for module in left.modules()) or any(module is left for module in right.modules())


@torch.inference_mode()
def try_blocks(model: Any, blocks: nn.ModuleList) -> Trial:
    """Run a model on the meta device once, with stand-ins; it is left as it was."""
    trial = Trial()
    try:
        with _stand_ins(model) as called:
            _run(model, blocks, trial, called)
    except Exception as error:  # the architecture's own code, on numbers that it never saw
        trial.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return trial


def _run(model: Any, blocks: nn.ModuleList, trial: Trial, called: set[int]) -> None:
    forms: dict[int, Returns] = {}
    beside: list[tuple[torch.Tensor, Origin]] = []

    def tried(index: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            hidden, call = split_call(arguments, keywords)
            if not trial.order:
                trial.layout, trial.shape = HiddenLayout.of(hidden), hidden.shape
            before = _sizes(call)
            trial.order.append(index)
            output = original(*arguments, **keywords)
            forms[index] = Returns.of(output)
            (grown, rest), (grown_before, rest_before) = _sizes(call), before
            trial.fills |= grown != grown_before
            trial.links[index], beyond = _links(call, beside)
            trial.handed_on |= rest != rest_before or beyond
            trial.uncalled[index] = _uncalled(block, called)
            mixtures = _experts(block).items()
            trial.unreached[index] = tuple(f"{name}." for name, one in mixtures if id(one) not in called)
            others = enumerate(forms[index].others)
            beside.extend((one, (index, place)) for place, one in others if isinstance(one, torch.Tensor))
            return forms[index].wrap(hidden)

        return forward

    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % model.get_input_embeddings().num_embeddings
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, tried(index, block)))
        head = model.get_output_embeddings()
        if head is not None:
            stack.enter_context(replaced_forward(head, lambda hidden: hidden))
        model(input_ids=ids, use_cache=False)
        trial.returns = [forms.get(index, Returns()) for index in range(len(blocks))]
        if any(tensor.is_floating_point() for tensor, _ in beside):
            trial.handed_on |= _reaches_changed(model, blocks, trial, ids)


def _reaches_changed(model: Any, blocks: nn.ModuleList, trial: Trial, ids: torch.Tensor) -> bool:
    """Whether the model computes something from what a block returns beside the hidden states, and hands that on."""
    reached = False
    marked = [
        Returns(one.container, tuple(_marked(other) for other in one.others)) if one.others else one
        for one in trial.returns
    ]

    def look(index: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
        nonlocal reached
        hidden, (beside, named) = split_call(arguments, keywords)
        links = trial.links.get(index, {})
        given: list[tuple[int | str, Any]] = [*enumerate(beside), *named.items()]
        reached |= any(_is_marked(value) for key, value in given if key not in links)
        return hidden

    with replaced_blocks(blocks, marked, look), contextlib.suppress(Exception):  # its own code, on NaN
        model(input_ids=ids, use_cache=False)
    return reached


def _marked(value: Any) -> Any:
    is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch.full_like(value, torch.nan) if is_number else value


def _is_marked(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_is_marked, inner))


def _uncalled(block: nn.Module, called: set[int]) -> frozenset[str]:
    experts = [f"{name}." for name in _experts(block)]
    return frozenset(
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in called and not name.startswith(tuple(experts))
    )


def _experts(block: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}


def _sizes(call: BlockCall) -> tuple[Any, Any]:
    """Sizes of the mappings among a call's keywords, and of all other containers in it, to see which a block fills."""
    arguments, keywords = call
    mappings = {name for name, value in keywords.items() if isinstance(value, MutableMapping)}
    rest = {name: value for name, value in keywords.items() if name not in mappings}
    return {name: len(keywords[name]) for name in sorted(mappings)}, (_nested(arguments), _nested(rest))


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        return len(value), [_nested(one) for one in value.values()]
    if isinstance(value, list | tuple):
        return len(value), [_nested(one) for one in value]
    return None


def _links(call: BlockCall, beside: Sequence[tuple[torch.Tensor, Origin]]) -> tuple[Links, bool]:
    """Arguments of a call that earlier blocks returned, and whether such a tensor is inside an argument too."""
    arguments, keywords = call
    found: Links = {}
    rest = []
    given: list[tuple[int | str, Any]] = [*enumerate(arguments), *keywords.items()]
    for key, value in given:
        origin = next((origin for tensor, origin in reversed(beside) if tensor is value), None)
        if origin is None:
            rest.append(value)
        else:
            found[key] = origin
    return found, any(_shares(rest, tensor) for tensor, _ in beside)


def _shares(value: Any, tensor: torch.Tensor) -> bool:
    """Whether a tensor is among the arguments of a call."""
    if isinstance(value, torch.Tensor):
        return value is tensor
    if isinstance(value, Mapping):
        return any(_shares(one, tensor) for one in value.values())
    return isinstance(value, list | tuple) and any(_shares(one, tensor) for one in value)


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[set[int]]:
    """Context in which a model on the meta device can be run; yields ids of linears and experts called so far."""
    called: set[int] = set()
    generator = torch.Generator().manual_seed(0)
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    with contextlib.ExitStack() as stack:
        try:
            for module in model.modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        saved.append((module, leaf, parameter))
                        constant = torch.full((), SCALE, dtype=parameter.dtype).expand(parameter.shape)
                        if parameter.dim() > 2 and parameter.numel() <= LARGEST:  # not every kernel takes strides of 0
                            constant = constant.contiguous()
                        module._parameters[leaf] = nn.Parameter(constant, requires_grad=False)
                if forward := _stand_in(module, called, generator):
                    stack.enter_context(replaced_forward(module, forward))
            yield called
        finally:
            for module, leaf, parameter in saved:
                module._parameters[leaf] = parameter


def _stand_in(module: nn.Module, called: set[int], generator: torch.Generator) -> Callable[..., Any] | None:
    original = module.forward
    computed = isinstance(module, nn.Linear | Conv1D) and type(module).forward not in (
        nn.Linear.forward,
        Conv1D.forward,
    )
    if computed or isinstance(module, Experts):

        def own(*arguments: Any, **keywords: Any) -> Any:
            called.add(id(module))
            return original(*arguments, **keywords)

        return own
    if isinstance(module, nn.Linear | Conv1D):
        outputs = module.out_features if isinstance(module, nn.Linear) else module.nf

        def linear(inputs: torch.Tensor) -> torch.Tensor:
            called.add(id(module))
            drawn = torch.randn((*inputs.shape[:-1], outputs), generator=generator)
            return drawn.mul_(SCALE).to(inputs.dtype)

        return linear
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:

        def embedding(ids: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn((*ids.shape, module.embedding_dim), generator=generator)
            return drawn.to(module.weight.dtype)

        return embedding
    stacked = (one for one in module.parameters(recurse=False) if one.dim() > 2 and one.numel() > LARGEST)
    if next(stacked, None) is not None:
        return lambda hidden, *_, **__: torch.zeros_like(hidden)
    return None
