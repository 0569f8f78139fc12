"""Statistics of linear inputs, gathered while a block runs: H = X^T X and the token count.

H serves every GPTQ permutation (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), scores AWQ
candidates, and its diagonal is llama.cpp's importance matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantize.source.streamed import Linear

Timed = Callable[[str], contextlib.AbstractContextManager[None]]
"""Books the time spent inside to a stage."""

PANELS = 6  # more panels leave out more of the upper half, but make narrower, slower products
NARROWEST = 96


def untimed(stage: str) -> contextlib.AbstractContextManager[None]:
    """Books nothing."""
    return contextlib.nullcontext()


def panels(size: int) -> list[tuple[int, int]]:
    """Where the panels of rows begin and end that H is summed in; each reaches up to its diagonal."""
    width = max(NARROWEST, -(-size // PANELS // 32) * 32)
    return [(first, min(first + width, size)) for first in range(0, size, width)]


@dataclass
class InputStatistics:
    """One distinct input of a block and the linears that read it.

    Attributes:
        linears: the linears that share this input (q/k/v, gate/up), in module order.
        hessian: X^T X over all tokens, float32 [in_features, in_features].
        drift: (S - X)^T X where S is what the source model feeds these linears; None where X is S.
        tokens: rows of X so far.
    """

    linears: list[Linear]
    hessian: torch.Tensor
    drift: torch.Tensor | None = None
    tokens: int = 0

    def add(self, rows: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Add the ``rows`` of X, float32 [rows, in_features], and what the source has in their place.

        X^T X is symmetric, so only panels up to the diagonal are computed; :meth:`finish` mirrors them.
        """
        for first, last in panels(rows.shape[-1]):
            self.hessian[first:last, :last].addmm_(rows[:, first:last].t(), rows[:, :last])
        if source is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.hessian)
            self.drift.addmm_((source - rows).t(), rows)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Mirror the lower panels, so that ``hessian`` is whole."""
        for first, last in panels(self.hessian.shape[0]):
            self.hessian[:first, first:last].copy_(self.hessian[first:last, :first].t())

    def release(self) -> None:
        """Give the memory back."""
        self.hessian, self.drift = torch.empty(0), None


@dataclass
class Collector:
    """Hooks a block's linears and gathers one :class:`InputStatistics` per distinct input.

    Which linears share an input is seen in the first run: they are handed the very same tensor. While that
    run lasts, all inputs are kept, so that no two of them can lie at one address.

    Attributes:
        timed: books the time that statistics take.
        gather: add to the statistics; False only watches.
        record: keep the rows of the last run, by the first linear that reads them, in ``rows``.
        source: a recording collector that watched the source model's block on the same windows just before.
    """

    linears: Sequence[Linear]
    timed: Timed = untimed
    gather: bool = True
    record: bool = False
    source: Collector | None = None
    groups: list[InputStatistics] = field(default_factory=list)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    _leader: dict[str, InputStatistics] = field(default_factory=dict)
    _first: dict[tuple[Any, ...], tuple[InputStatistics, torch.Tensor]] | None = field(default_factory=dict)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, one run of the block adds to the statistics; the first settles the sharing of inputs."""
        handles = [
            linear.module.register_forward_pre_hook(self._hook(linear), with_kwargs=True) for linear in self.linears
        ]
        self.rows.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._first = None

    def unread(self) -> list[str]:
        """Linears that no token has reached."""
        return [linear.local for linear in self.linears if not self._reached(linear)]

    def _reached(self, linear: Linear) -> bool:
        return any(linear is member for group in self.groups for member in group.linears)

    def _hook(self, linear: Linear) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs: torch.Tensor = arguments[0] if arguments else next(iter(keywords.values()))
            if self._first is None:
                if linear.local in self._leader:
                    self._take(linear, inputs)
                return
            identity = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride())
            known = self._first.get(identity)
            if known is not None:
                known[0].linears.append(linear)
                return
            size = inputs.shape[-1] if self.gather else 0
            group = InputStatistics([linear], torch.zeros(size, size, device=inputs.device))
            self.groups.append(group)
            self._leader[linear.local] = group
            self._first[identity] = (group, inputs)
            self._take(linear, inputs)

        return hook

    def _take(self, linear: Linear, inputs: torch.Tensor) -> None:
        with self.timed("statistics"):
            rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
            if self.record:
                self.rows[linear.local] = rows
            if self.gather:
                self._leader[linear.local].add(rows, self.source.rows[linear.local] if self.source else None)
