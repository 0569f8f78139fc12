"""Perplexity and divergence of quantized models from their source, all streamed together block by block.

Every model carries its own activations; a block's weights are read once and replaced by each branch's dequantized ones
in turn, so memory is one block, the activations, and a bounded piece of the source's log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.calibration.forward import Activations
from quantize.errors import NotFiniteError
from quantize.measuring.store import Store
from quantize.methods.sums import mean, total
from quantize.reporter import SILENT, Reporter
from quantize.source.linear import Linear
from quantize.source.streamed import StreamedModel

SOURCE = "source"
AGAIN = "source, in other batches"
"""The source a second time, in batches of another size: what rounding alone does to the figures."""
REFERENCE_BYTES = 384 * 2**20
"""Most that the source's log-probabilities may take while the branches are compared with them."""
SPAN_BYTES = 32 * 2**20
"""Most that the logits of the tokens looked at in one step may take."""


class Weights(Protocol):
    """What a branch's loader computes with, by names in the checkpoint."""

    def weight(self, module: str) -> torch.Tensor:
        """A quantized linear's weight, [out_features, in_features] float32."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Any other tensor: norms, biases, embeddings, head."""
        ...


@dataclass(frozen=True)
class Quality:
    """How good a branch is on a held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of each next token.
        perplexity_error: its standard error, over tokens.
        kl_divergence: mean KL divergence of its next-token distribution from the source's, in nats.
        kl_error: its standard error, over tokens.
        kl_median, kl_p99: median and 99th percentile over tokens.
        top1_agreement: share of tokens whose most likely successor is the source's.
    """

    branch: str
    perplexity: float
    perplexity_error: float
    kl_divergence: float
    kl_error: float
    kl_median: float
    kl_p99: float
    top1_agreement: float

    def as_data(self) -> dict[str, Any]:
        return dict(self.__dict__)


def measure_quality(
    model: StreamedModel,
    ids: NDArray[np.int64],
    branches: Mapping[str, Weights],
    batch: int,
    *,
    store: Store | None = None,
    reporter: Reporter = SILENT,
) -> list[Quality]:
    """Quality of the source (first, against itself), of the source in other batches, and of every branch.

    The figures of a branch whose hidden states are NaN or infinite are NaN.

    Args:
        model: the source, with its head loaded.
        ids: int64 [samples, length].
        batch: windows run at a time.
        store: keeps the source's outputs for the next call, and everything after an interruption.
    """
    states, start, broken = _begin(model, ids, branches, batch, store)
    own = [name for name in states if name not in branches]
    with reporter.progress("measure", len(model), "block", start) as advance:
        for index in range(start, len(model)):
            with model.block(index) as block:
                linears = model.linears(block)
                for name in own:
                    if store is None or not store.has_source:
                        states[name].advance(index, block)
                for name, weights in branches.items():
                    if name in broken:
                        continue
                    with _worn(model, index, block, linears, weights):
                        try:
                            states[name].advance(index, block)
                        except NotFiniteError:  # this branch is damaged; the others are measured all the same
                            broken.add(name)
                            del states[name]
            if store is not None and not model.hands_on:
                store.interim(index + 1, {name: state.hidden for name, state in states.items()})
            advance(1)
    if store is not None:
        store.keep_source({name: states[name].hidden for name in own})
    rows = list(_compare(model, states, branches, reporter))
    rows += [Quality(name, *[math.nan] * (len(fields(Quality)) - 1)) for name in branches if name in broken]
    if store is not None:
        store.done()
    return rows


def _begin(
    model: StreamedModel, ids: NDArray[np.int64], branches: Mapping[str, Weights], batch: int, store: Store | None
) -> tuple[dict[str, Activations], int, set[str]]:
    """The states of the source and all branches, the block that they are to enter, and which branches gave NaN."""
    states = {SOURCE: Activations(model, ids, batch)}
    if len(ids) > 1:
        states[AGAIN] = Activations(model, ids, 1 if batch > 1 else 2)
    for name, weights in branches.items():
        model.load_outside(weights.tensor)
        states[name] = Activations(model, ids, batch)
    model.load_outside()
    start, broken = 0, set[str]()
    if store is not None:
        start, kept = store.resume()
        for name, hidden in kept.items():
            if name in states:
                states[name].hidden = hidden
        broken = {name for name in branches if start and name not in kept}
        for name in broken:
            del states[name]
    return states, start, broken


def branch_logits(model: StreamedModel, ids: Sequence[int], weights: Weights) -> torch.Tensor:
    """Logits [length, vocabulary] of one window of token ids with a branch's tensors."""
    model.load_outside(weights.tensor)
    state = Activations(model, np.array([ids], dtype=np.int64), 1)
    for index in range(len(model)):
        with model.block(index) as block, _worn(model, index, block, model.linears(block), weights):
            state.advance(index, block)
    logits = model.logits(state.ids, state.hidden.to(model.device))[0].float()
    model.load_outside()
    return logits


@contextmanager
def _worn(
    model: StreamedModel, index: int, block: nn.Module, linears: Sequence[Linear], weights: Weights
) -> Iterator[None]:
    """Give a loaded block all of a branch's own tensors, and the scales that its loader divides activations by."""
    quantized = {id(linear.module.weight) for linear in linears}
    for linear in linears:
        linear.set_weight(weights.weight(model.checkpoint_name(index, linear.local)))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if id(parameter) not in quantized:
                parameter.copy_(weights.tensor(model.names[f"{model.block_prefix}{index}.{name}"]))
    with divided_activations(model, index, block, getattr(weights, "activation_scales", {})):
        yield


@contextmanager
def divided_activations(
    model: StreamedModel, index: int, block: nn.Module, scales: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Divide the outputs of a loaded block's activations as the loaders of AWQ do; ``scales`` by checkpoint names."""
    prefix = model.checkpoint_prefix(index)
    with ExitStack() as hooks:
        for module, values in scales.items():
            if module.startswith(prefix):
                divided = block.get_submodule(module.removeprefix(prefix))
                handle = divided.register_forward_hook(partial(_divide, values.to(model.device)))
                hooks.callback(handle.remove)
        yield


def _divide(scales: torch.Tensor, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output / scales.to(output.dtype)


class _Figures:
    """Per-token figures of one branch, gathered window by window."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.divergences: list[torch.Tensor] = []
        self.agreements: list[torch.Tensor] = []

    def add(self, reference: torch.Tensor, chances: torch.Tensor, successors: torch.Tensor) -> None:
        """Log-probabilities [length, vocabulary] of the source and of the branch; successors [length, 1]."""
        self.losses.append(-chances.gather(-1, successors)[..., 0].double().cpu())
        self.divergences.append((reference.exp() * (reference - chances)).sum(-1).double().cpu())
        self.agreements.append((chances.argmax(dim=-1) == reference.argmax(dim=-1)).double().cpu())

    def quality(self, name: str) -> Quality:
        loss, agreement = torch.cat(self.losses).flatten(), torch.cat(self.agreements)
        spread = torch.cat(self.divergences).flatten().clamp(min=0)
        perplexity, count = _exp(mean(loss)), spread.numel()
        return Quality(
            branch=name,
            perplexity=perplexity,
            perplexity_error=perplexity * _deviation(loss) / math.sqrt(count),
            kl_divergence=mean(spread),
            kl_error=_deviation(spread) / math.sqrt(count),
            kl_median=float(spread.median()),
            kl_p99=float(spread.kthvalue(max(1, math.ceil(0.99 * count))).values),
            top1_agreement=mean(agreement),
        )


def _exp(value: float) -> float:
    """e to a power; infinity where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _deviation(values: torch.Tensor) -> float:
    """The standard deviation of a sample."""
    return math.sqrt(total((values - mean(values)).square()) / (values.numel() - 1)) if values.numel() > 1 else math.nan


def _compare(
    model: StreamedModel, states: Mapping[str, Activations], branches: Mapping[str, Weights], reporter: Reporter
) -> Iterator[Quality]:
    """Each state's head over all tokens, a piece of them at a time, against the source's log-probabilities."""
    figures = {name: _Figures() for name in states}
    ids = states[SOURCE].ids
    vocabulary = model.logits(ids[:1, :2], states[SOURCE].hidden[:1, :2].to(model.device)).shape[-1]
    pieces = _pieces(len(ids), ids.shape[1] - 1, 4 * vocabulary)
    with reporter.progress("compare", len(pieces) * len(states), "piece") as advance:
        for spans in pieces:
            model.load_outside()
            references = [_chances(model, states[SOURCE], span) for span in spans]
            for name, state in states.items():
                if name != SOURCE:
                    model.load_outside(branches[name].tensor if name in branches else None)
                for span, reference in zip(spans, references, strict=True):
                    chances = reference if name == SOURCE else _chances(model, state, span)
                    successors = ids[span.window, span.first + 1 : span.last + 1, None].to(model.device)
                    figures[name].add(reference, chances, successors)
                advance(1)
    model.load_outside()
    for name in states:
        yield figures[name].quality(name)


@dataclass(frozen=True)
class _Span:
    """Neighbouring tokens of one window, from ``first`` up to and without ``last``."""

    window: int
    first: int
    last: int


def _pieces(windows: int, length: int, token_bytes: int) -> list[list[_Span]]:
    """All tokens but each window's last as spans, and these in pieces whose log-probabilities fit into memory."""
    step = max(1, SPAN_BYTES // token_bytes)
    spans = [
        _Span(window, first, min(first + step, length)) for window in range(windows) for first in range(0, length, step)
    ]
    many = max(1, REFERENCE_BYTES // (token_bytes * min(step, length)))
    return [spans[start : start + many] for start in range(0, len(spans), many)]


def _chances(model: StreamedModel, state: Activations, span: _Span) -> torch.Tensor:
    """Log-probabilities [length, vocabulary] of the tokens after those of a span."""
    window, tokens = slice(span.window, span.window + 1), slice(span.first, span.last)
    hidden = state.hidden[window, tokens].to(model.device)
    return model.logits(state.ids[window, tokens], hidden)[0].float().log_softmax(dim=-1)
