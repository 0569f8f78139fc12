"""Find by experiment, on the real block, which preceding operation can absorb an AWQ input scale.

A norm that produces the input can absorb the inverse scale in its weight. So can a linear whose outputs reach the
input channel by channel: v_proj through attention into o_proj, up_proj through the product with the gate into
down_proj, fc1 through a ReLU into fc2. No architecture needs a table: scaling by random numbers preserves the block's
output if the fold is right, and changes it if not.

Experts are tried one by one, outside their block, because the trial's tokens may reach none of them. An expert's
up_proj absorbs the scale of its down_proj. The norm before experts absorbs none: it also feeds the router, which is
not quantized, and other experts with other tokens and scales. Trials of other linears keep the router's choices
fixed, because rounding alone could change one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantize.calibration.statistics import InputStatistics
from quantize.source.experts import pinned_routing
from quantize.source.linear import Linear
from quantize.source.streamed import StreamedModel

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""Relative to the norm of the block's change to its input; a wrong fold differs by a third or more."""
TRIAL_ROWS = 32


@dataclass(frozen=True)
class Fold:
    """The preceding operation that absorbs an input's scale.

    Attributes:
        producer: name of its module inside the block.
        rows: index of the output that feeds each input channel, [K] int64.
        norm: whether it is a norm; otherwise it is a linear or an activation.
        plus_one: whether the norm multiplies by 1 + weight (Gemma).
        activation: whether it is an activation, whose output loaders divide by a separate tensor.
    """

    producer: str
    rows: torch.Tensor
    norm: bool
    plus_one: bool = False
    activation: bool = False


def find_folds(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    groups: Sequence[InputStatistics],
    *,
    hidden: torch.Tensor,
    activation: str | None = None,
) -> dict[str, Fold | None]:
    """Find the fold of each group's first linear, by name in the block; None if nothing can absorb a scale.

    Args:
        block: loaded; its weights are restored afterwards. hidden: its input, [batch, length, width].
        activation: name of the module whose output loaders divide by separate scales, if the architecture has one.
    """
    with torch.inference_mode(), pinned_routing(block):
        seen: dict[str, torch.Tensor] = {}
        before = _modules_before(model, index, block, groups, hidden=hidden, activation=activation, outputs=seen)
        expected = model.run(index, block, hidden)
        change = float((expected - hidden).float().norm())

        def run_block() -> torch.Tensor:
            return model.run(index, block, hidden)

        found: dict[str, Fold | None] = {}
        for group in groups:
            leader = group.linears[0].local
            if group.linears[0].expert is not None:
                found[leader] = _expert_fold(model, block, group)
                continue
            producer = before.get(leader)
            if producer is not None and producer.rpartition(".")[2] == activation:
                found[leader] = Fold(producer, torch.arange(group.linears[0].weight.shape[1]), False, activation=True)
                continue
            candidates = [*_norm_folds(block, producer), *_linear_folds(model, block, group)]
            found[leader] = next(
                (
                    fold
                    for fold in candidates
                    if _holds(block, group, fold, run=run_block, expected=expected, change=change)
                ),
                None,
            )
    return found


def _expert_fold(model: StreamedModel, block: nn.Module, group: InputStatistics) -> Fold | None:
    """The linear of the same expert that absorbs an input's scale, tried on random rows."""
    expert = group.linears[0].expert
    assert expert is not None
    if group.linears[0].module is not expert.outer:
        return None  # the router and other experts read this input too
    mates = [linear for linear in model.linears(block) if linear.expert is expert and linear.module is not expert.outer]
    weight = mates[0].weight
    drawn = torch.randn(TRIAL_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(1))
    rows = drawn.to(weight.device, weight.dtype)
    expected = expert(rows)
    straight = torch.arange(group.linears[0].weight.shape[1])
    folds = (Fold(mate.local, straight, norm=False) for mate in mates if mate.weight.shape[0] == len(straight))
    change = float(expected.float().norm())
    return next(
        (
            fold
            for fold in folds
            if _holds(block, group, fold, run=lambda: expert(rows), expected=expected, change=change)
        ),
        None,
    )


def _modules_before(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    groups: Sequence[InputStatistics],
    *,
    hidden: torch.Tensor,
    activation: str | None,
    outputs: dict[str, torch.Tensor],
) -> dict[str, str]:
    """The norm or activation that produces the input tensor of each group's first linear, by that linear's name."""
    produced: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}

    def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()

    def after(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output  # keeps it alive, so that no later tensor gets its address
                produced[identity(output)] = name

        return hook

    def entering(leader: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs = arguments[0] if arguments else next(iter(keywords.values()))
            if (norm := produced.get(identity(inputs))) is not None:
                found[leader] = norm

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            is_norm = isinstance(weight, torch.Tensor) and weight.dim() == 1
            if is_norm or name.rpartition(".")[2] == activation:
                stack.callback(module.register_forward_hook(after(name)).remove)
        for group in groups:
            first = group.linears[0]
            stack.callback(first.module.register_forward_pre_hook(entering(first.local), with_kwargs=True).remove)
        model.run(index, block, hidden)
    return found


def _norm_folds(block: nn.Module, norm: str | None) -> Iterator[Fold]:
    if norm is None:
        return
    rows = torch.arange(_outputs(block.get_submodule(norm)))
    yield Fold(norm, rows, norm=True)
    yield Fold(norm, rows, norm=True, plus_one=True)


def _outputs(norm: nn.Module) -> int:
    assert isinstance(norm.weight, torch.Tensor)
    return norm.weight.numel()


def _linear_folds(model: StreamedModel, block: nn.Module, group: InputStatistics) -> Iterator[Fold]:
    """Candidate folds: runs of outputs of other linears that could feed the K inputs one to one, or head by head."""
    columns = group.linears[0].weight.shape[1]
    own = {linear.local for linear in group.linears}
    config = model.model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    fewer = 1 if getattr(config, "multi_query", False) else int(getattr(config, "num_key_value_heads", 0) or heads)
    straight = torch.arange(columns)
    for linear in model.linears(block):
        if linear.local in own or linear.expert is not None:  # experts' outputs are summed
            continue
        outputs = linear.weight.shape[0]
        if outputs >= columns:  # all of them, or the last of a fused projection
            yield Fold(linear.local, straight + outputs - columns, norm=False)
        if heads and fewer < heads and columns % heads == 0:
            wide = columns // heads
            if outputs >= fewer * wide:  # grouped-query attention: several heads share one
                shared = (straight // wide // (heads // fewer)) * wide + straight % wide
                yield Fold(linear.local, shared + outputs - fewer * wide, norm=False)


def _holds(
    block: nn.Module,
    group: InputStatistics,
    fold: Fold,
    *,
    run: Callable[[], torch.Tensor],
    expected: torch.Tensor,
    change: float,
) -> bool:
    """Whether the output is preserved when the producer divides by random scales and the linears multiply by them.

    Args:
        run: computes the output. expected: the output before. change: the norm that the tolerance is relative to.
    """
    producer = block.get_submodule(fold.producer)
    outputs = _outputs(producer) if fold.norm else Linear(fold.producer, producer).weight.shape[0]
    drawn = torch.rand(outputs, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).exp_()
    untouched = torch.ones(outputs, dtype=torch.bool)
    untouched[fold.rows] = False
    drawn[untouched] = 1
    scale = drawn.to(device=expected.device, dtype=torch.float32)
    touched = [producer, *(linear.module for linear in group.linears)]
    parameters = [parameter for module in touched for parameter in module.parameters(recurse=False)]
    saved = [parameter.clone() for parameter in parameters]
    try:
        _divide(producer, fold, scale)
        columns = scale[fold.rows.to(scale.device)]
        for linear in group.linears:
            linear.set_weight(linear.weight.float() * columns)
        result = run()
    finally:
        for parameter, values in zip(parameters, saved, strict=True):
            parameter.copy_(values)
    return bool((result - expected).float().norm() <= TOLERANCE[expected.dtype] * change)


def _divide(producer: nn.Module, fold: Fold, scale: torch.Tensor) -> None:
    bias = getattr(producer, "bias", None)
    if fold.norm:
        weight = producer.weight
        assert isinstance(weight, torch.Tensor)
        offset = 1.0 if fold.plus_one else 0.0
        weight.copy_((weight.float() + offset) / scale - offset)
    else:
        linear = Linear(fold.producer, producer)
        linear.set_weight(linear.weight.float() / scale[:, None])
    if isinstance(bias, torch.Tensor):
        bias.copy_(bias.float() / scale)
