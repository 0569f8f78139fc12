"""Perplexity and divergence of quantized models from their source, all streamed together block by block.

Every model carries its own activations; a block's weights are read once and replaced by each branch's
dequantized ones in turn, so memory is one block plus the activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from quantize.calibration.forward import Activations
from quantize.source.streamed import Linear, StreamedModel

SOURCE = "source"


class Weights(Protocol):
    """What a branch's loader computes with, by names in the checkpoint."""

    def weight(self, module: str) -> torch.Tensor:
        """A quantized linear's weight, [out_features, in_features] float32."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Any other tensor of a block: norms, biases."""
        ...


@dataclass(frozen=True)
class Quality:
    """How good a branch is on a held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of each next token.
        perplexity_error: its standard error, over tokens.
        kl_divergence: mean KL divergence of its next-token distribution from the source's, in nats.
        kl_median, kl_p99: median and 99th percentile over tokens.
        top1_agreement: share of tokens whose most likely successor is the source's.
    """

    branch: str
    perplexity: float
    perplexity_error: float
    kl_divergence: float
    kl_median: float
    kl_p99: float
    top1_agreement: float

    def as_data(self) -> dict[str, Any]:
        return dict(self.__dict__)


def measure_quality(
    model: StreamedModel,
    ids: np.ndarray,
    branches: Mapping[str, Weights],
    batch: int,
    progress: bool | None = None,
) -> list[Quality]:
    """Quality of the source (first, against itself) and of every branch.

    Args:
        model: the source, with its head loaded.
        ids: int64 [samples, length].
        batch: windows run at a time.
    """
    states = {SOURCE: Activations(model, ids, batch)}
    for name in branches:
        states[name] = states[SOURCE].copy()
    for index in tqdm(
        range(len(model)), desc="measure", unit="block", disable=None if progress is None else not progress
    ):
        with model.block(index) as block:
            linears = model.linears(block)
            states[SOURCE].advance(index, block)
            for name, weights in branches.items():
                _wear(model, index, block, linears, weights)
                states[name].advance(index, block)
    return _compare(model, states)


def _wear(model: StreamedModel, index: int, block: nn.Module, linears: Sequence[Linear], weights: Weights) -> None:
    """Give a loaded block all of a branch's own tensors."""
    quantized = {id(linear.module.weight) for linear in linears}
    for linear in linears:
        linear.set_weight(weights.weight(model.checkpoint_name(index, linear.local)))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if id(parameter) not in quantized:
                parameter.copy_(weights.tensor(model.names[f"{model.block_prefix}{index}.{name}"]))


def _compare(model: StreamedModel, states: Mapping[str, Activations]) -> list[Quality]:
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in states}
    divergences: dict[str, list[torch.Tensor]] = {name: [] for name in states}
    agreements: dict[str, list[torch.Tensor]] = {name: [] for name in states}
    ids = states[SOURCE].ids
    for start in range(len(ids)):  # one window at a time: logits over a large vocabulary are what takes memory here
        window = ids[start : start + 1]
        successors = window[:, 1:, None].to(model.device)
        weights = entropy = best = torch.empty(0)  # of the source, which comes first
        for name, state in states.items():
            logits = model.logits(window, state.hidden[start : start + 1].to(model.device))[:, :-1].float()
            chances = logits.log_softmax(dim=-1)
            if name == SOURCE:
                weights = chances.exp()
                entropy = torch.einsum("btv,btv->bt", weights, chances)
                best = chances.argmax(dim=-1)
            losses[name].append(-chances.gather(-1, successors)[..., 0].double().cpu())
            crossed = torch.einsum("btv,btv->bt", weights, chances)
            divergences[name].append((entropy - crossed).double().cpu())
            agreements[name].append((chances.argmax(dim=-1) == best).double().cpu())
    return [
        _quality(name, torch.cat(losses[name]), torch.cat(divergences[name]), torch.cat(agreements[name]))
        for name in states
    ]


def _quality(name: str, loss: torch.Tensor, divergence: torch.Tensor, agreement: torch.Tensor) -> Quality:
    perplexity = math.exp(float(loss.mean()))
    spread = divergence.flatten().clamp(min=0)
    return Quality(
        branch=name,
        perplexity=perplexity,
        perplexity_error=perplexity * float(loss.std()) / math.sqrt(loss.numel()),
        kl_divergence=float(spread.mean()),
        kl_median=float(spread.median()),
        kl_p99=float(spread.kthvalue(max(1, math.ceil(0.99 * spread.numel()))).values),
        top1_agreement=float(agreement.mean()),
    )
