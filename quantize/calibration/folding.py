"""Find by experiment, on the real block, which preceding operation can absorb an AWQ input scale.

A norm that produces the input can absorb the inverse scale in its weight. So can a linear whose outputs reach the
input channel by channel: v_proj through attention into o_proj, up_proj through the product with the gate into
down_proj, fc1 through a ReLU into fc2. No architecture needs a table, and no number of heads: an operation's outputs
are multiplied by powers of two, and the powers that arrive at the input say which output feeds which channel.

A fold is then proven where it acts (:mod:`quantize.calibration.trial`): with the producer divided by scales and the
linears' columns multiplied by them, each of those linears must read exactly the divided input, and everything else that
computes with something in the block, and the block's outputs, must not change. So nothing that lies behind a
nonlinearity passes, and no norm does whose output is also read by a router, or by the residual stream.

Experts are tried one by one, outside their block, because the trial's tokens may reach none of them. An expert's
up_proj absorbs the scale of its down_proj. The norm before experts absorbs none: it also feeds the router, which is
not quantized, and other experts with other tokens and scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.calibration.kinds import kind_of
from quantize.calibration.statistics import InputStatistics
from quantize.calibration.trial import TOLERANCE, Seen, Trial, drawn, output_times, replaced
from quantize.source.experts import Expert, pinned_routing
from quantize.source.linear import Linear
from quantize.source.streamed import StreamedModel

POWERS = 64  # of two, in one run: an output's number is read digit by digit to this base
TRIAL_ROWS = 128
NORM_REACHES, REACHES = (2, 3), (3, 8)
"""Largest powers of two of a proof's scales, draw by draw. A norm that adds one to its weight rounds larger ones."""


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


@dataclass(frozen=True)
class _Producer:
    """An operation that may absorb scales: its name and module, its number of outputs, and how it would absorb them."""

    name: str
    module: nn.Module
    outputs: int
    norm: bool = False
    activation: bool = False

    def folds(self, rows: torch.Tensor) -> Iterator[Fold]:
        if self.activation:
            if torch.equal(rows, torch.arange(self.outputs)):  # loaders divide it as it is
                yield Fold(self.name, rows, norm=False, activation=True)
        elif self.norm:
            yield Fold(self.name, rows, norm=True)
            yield Fold(self.name, rows, norm=True, plus_one=True)
        else:
            yield Fold(self.name, rows, norm=False)


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
        block: loaded; its weights are restored afterwards.
        hidden: its input, [batch, length, width], of which only shape and device count.
        activation: name of the module whose output loaders divide by separate scales, if the architecture has one.
    """
    states = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    found: dict[str, Fold | None] = {group.linears[0].local: None for group in groups}
    plain = [group for group in groups if group.linears[0].expert is None]
    with torch.inference_mode(), drawn(block), pinned_routing(block):
        if plain:
            trial = Trial(block, lambda: model.run(index, block, states))
            found |= _search(trial, list(_producers(block, plain, activation)), plain)
        known: dict[Hashable, Fold | None] = {}
        for group in groups:
            if (expert := group.linears[0].expert) is not None and group.linears[0].module is expert.outer:
                found[group.linears[0].local] = _expert_fold(expert, group, known)
    return found


def _expert_fold(expert: Expert, group: InputStatistics, known: dict[Hashable, Fold | None]) -> Fold | None:
    """The linear of the same expert that absorbs an input's scale, tried on random rows, once for experts alike.

    What the expert's other linears read is read by the router and by other experts too.
    """
    names = {module: name for name, module in expert.named_modules()}
    leader = group.linears[0]
    prefix = leader.local.removesuffix(names[leader.module])
    kind = kind_of(expert)
    if kind not in known:
        inner = [(name, part) for name, part in expert.named_modules() if isinstance(part, nn.Linear)]
        mates = [Linear(name, part) for name, part in inner if part is not expert.outer]
        dice = torch.Generator().manual_seed(1)
        rows = torch.randn(TRIAL_ROWS, mates[0].weight.shape[1], generator=dice).to(leader.weight.device)
        producers = [_Producer(mate.local, mate.module, mate.weight.shape[0]) for mate in mates]
        known[kind] = _search(Trial(expert, lambda: expert(rows)), producers, [group]).get(leader.local)
    fold = known[kind]
    return Fold(prefix + fold.producer, fold.rows, norm=False) if fold else None


def _producers(block: nn.Module, groups: Sequence[InputStatistics], activation: str | None) -> Iterator[_Producer]:
    """What may absorb a scale: an activation that loaders divide, norms, and then quantized linears."""
    linears = [linear for group in groups for linear in group.linears]
    modules = dict(block.named_modules())
    inside = {part for module in modules.values() if isinstance(module, Expert) for part in module.modules()}
    if activation is not None:
        for name, module in modules.items():
            if name.rpartition(".")[2] == activation:
                for width in sorted({linear.weight.shape[1] for linear in linears}):
                    yield _Producer(name, module, width, activation=True)
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and name and module not in inside:
            yield _Producer(name, module, weight.numel(), norm=True)
    places = {name: place for place, name in enumerate(modules)}
    for linear in sorted(linears, key=lambda linear: places[linear.local]):
        yield _Producer(linear.local, linear.module, linear.weight.shape[0])


def _search(trial: Trial, producers: Sequence[_Producer], groups: Sequence[InputStatistics]) -> dict[str, Fold | None]:
    """The first fold that is proven, of each group that has one, by its first linear."""
    found: dict[str, Fold | None] = {}
    for producer in producers:
        left = [group for group in groups if group.linears[0].local not in found]
        for group, rows in _fed(trial, producer, left):
            fold = next((fold for fold in producer.folds(rows) if _holds(trial, producer, fold, group)), None)
            if fold is not None:
                found[group.linears[0].local] = fold
    return found


def _fed(
    trial: Trial, producer: _Producer, groups: Sequence[InputStatistics]
) -> list[tuple[InputStatistics, torch.Tensor]]:
    """Groups whose whole input is, channel by channel, outputs of a producer times something; with their numbers [K].

    All of its outputs, or a part of a fused projection: the last or first ones, of all or of every head.
    """
    found = _numbers(trial, producer, groups, torch.arange(producer.outputs))
    for last in () if producer.norm or producer.activation else (True, False):
        left = [group for group in groups if group.linears[0].local not in found]
        if left:
            seen = _enlarged(trial, producer, _edge(producer.outputs, 1, last))
            for group in left:
                part = _clean_part(trial, producer, group, _arrived(trial, seen, group), last)
                if part is not None:
                    found |= _numbers(trial, producer, [group], part)
    return [(group, found[group.linears[0].local]) for group in groups if group.linears[0].local in found]


def _numbers(
    trial: Trial, producer: _Producer, groups: Sequence[InputStatistics], part: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Numbers of the outputs that feed each channel, by the first linear, of groups whose whole input ``part`` feeds.

    The outputs are multiplied by 2^d, where d is one digit of an output's place in ``part``, run after run.
    """
    places: dict[str, torch.Tensor] = {}
    left, unit = list(groups), 1
    while left and unit < max(2, len(part)):
        factor = torch.ones(producer.outputs)
        factor[part] = _power_of_two(torch.arange(len(part)) // unit % POWERS - POWERS // 2)
        with output_times(producer.module, factor):
            seen = trial.observe()
        for group in list(left):
            leader, powers = group.linears[0].local, _arrived(trial, seen, group)
            if powers is None or (unit == 1 and not bool(powers.any())):  # the latter: nothing of it arrives
                left.remove(group)
                places.pop(leader, None)
                continue
            places[leader] = places.get(leader, torch.zeros_like(powers)) + (powers + POWERS // 2) * unit
        unit *= POWERS
    inside = {leader: place for leader, place in places.items() if place.min() >= 0 and place.max() < len(part)}
    return {leader: part[place] for leader, place in inside.items()}


def _clean_part(
    trial: Trial, producer: _Producer, group: InputStatistics, powers: torch.Tensor | None, last: bool
) -> torch.Tensor | None:
    """The outputs of a fused projection that feed a group, such as the values' part of queries, keys and values.

    Args:
        powers: what arrives of its outermost output, enlarged. last: whether that is the last one, or the first.
    """
    if powers is None or not bool(powers.any()):
        return None
    clean, dirty = 1, producer.outputs  # more outputs reach the input in another way than one to one, or all do not
    while dirty - clean > 1:
        middle = (clean + dirty) // 2
        seen = _enlarged(trial, producer, _edge(producer.outputs, middle, last))
        arrived = _arrived(trial, seen, group)
        if arrived is None:
            dirty = middle
        else:
            clean, powers = middle, arrived
    reached = int((powers > 0).sum())
    parts, rest = divmod(len(powers), reached)
    if rest or producer.outputs % parts or clean > producer.outputs // parts:
        return None
    every = producer.outputs // parts  # one head's outputs, or all
    return (torch.arange(parts)[:, None] * every + _edge(every, clean, last)).reshape(-1)


def _edge(outputs: int, count: int, last: bool) -> torch.Tensor:
    return torch.arange(outputs - count, outputs) if last else torch.arange(count)


def _enlarged(trial: Trial, producer: _Producer, part: torch.Tensor) -> Seen:
    """A run with some outputs multiplied by 2, 4 and 8 in turn: a norm would hide one factor for all."""
    factor = torch.ones(producer.outputs)
    factor[part] = _power_of_two(part % 3 + 1)
    with output_times(producer.module, factor):
        return trial.observe()


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents)


def _arrived(trial: Trial, seen: Seen, group: InputStatistics) -> torch.Tensor | None:
    """The powers of two by which a group's channels were multiplied, as :func:`_powers`."""
    reader = group.linears[0].module
    return _powers(seen.inputs.get(reader, []), trial.before.inputs.get(reader, []))


def _powers(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The power of two by which each channel was multiplied, the same for all tokens, [K] int64; None if there is none.

    Args:
        now, then: the samples of an input, call by call.
    """
    if not then or [one.shape for one in now] != [one.shape for one in then]:
        return None
    after, before = torch.cat(list(now)).double(), torch.cat(list(then)).double()
    size = before.norm(dim=0)
    powers = (after.norm(dim=0) / size).log2().round()
    if not bool(torch.isfinite(powers).all()):  # a channel that carries nothing proves nothing
        return None
    expected: torch.Tensor = before * torch.exp2(powers)
    if not bool(((after - expected).norm(dim=0) <= TOLERANCE * expected.norm(dim=0)).all()):
        return None
    found: torch.Tensor = powers.long().cpu()
    return found


def _holds(trial: Trial, producer: _Producer, fold: Fold, group: InputStatistics) -> bool:
    """Whether nothing but the group's input changes when the producer divides by scales and the linears multiply."""
    for seed, reach in enumerate(NORM_REACHES if fold.norm else REACHES):
        dice = torch.Generator().manual_seed(seed)
        scale = _power_of_two(torch.randint(-reach, reach + 1, (producer.outputs,), generator=dice))
        untouched = torch.ones(producer.outputs, dtype=torch.bool)
        untouched[fold.rows] = False
        scale[untouched] = 1
        columns = scale[fold.rows].to(group.linears[0].weight.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_divided(producer, fold, scale.to(columns.device)))
            for linear in group.linears:
                weight = linear.weight * columns
                if isinstance(linear.module, Conv1D):
                    weight = weight.t()
                stack.enter_context(replaced(linear.module, weight=weight))
            seen = trial.observe()
        if not trial.is_preserved(seen, {linear.module: columns for linear in group.linears}):
            return False
    return True


@contextlib.contextmanager
def _divided(producer: _Producer, fold: Fold, scale: torch.Tensor) -> Iterator[None]:
    """Context in which a producer's outputs are divided by ``scale`` [N], in the way of the fold."""
    module = producer.module
    if fold.activation:
        with output_times(module, 1 / scale):
            yield
        return
    if fold.norm:
        offset = 1.0 if fold.plus_one else 0.0
        weight = module._parameters["weight"]
        assert weight is not None
        changed = {"weight": (weight + offset) / scale - offset}
    else:
        divided = Linear(producer.name, module).weight / scale[:, None]
        changed = {"weight": divided.t() if isinstance(module, Conv1D) else divided}
    bias = module._parameters.get("bias")
    if bias is not None:
        changed["bias"] = bias / scale
    with replaced(module, **changed):
        yield
