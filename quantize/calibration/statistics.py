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

from quantize.reporter import SILENT, Reporter
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
        tokens: rows of X so far. None at all (an expert that the router chose for no token): H is the identity, by
            which every method rounds to nearest.
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
        if not self.tokens:
            self.hessian.diagonal().fill_(1.0)
        for first, last in panels(self.hessian.shape[0]):
            self.hessian[:first, first:last].copy_(self.hessian[first:last, :first].t())

    def release(self) -> None:
        """Give the memory back."""
        self.hessian, self.drift = torch.empty(0), None


@dataclass
class Collector:
    """Hooks a block's linears and gathers one :class:`InputStatistics` per distinct input.

    Which linears share an input is seen in the first run that reaches them: they are handed the very same tensor. While
    that run lasts, such inputs are kept, so that no two of them can lie at one address.

    Attributes:
        timed: books the time that statistics take.
        gather: add to the statistics; False only watches.
        record: keep the rows of the last run, by the first linear that reads them, in ``rows``; and in ``tokens``, for
            the linears of experts, which tokens of the run they are.
        source: a recording collector that watched the source model's block on the same windows just before.
    """

    linears: Sequence[Linear]
    reporter: Reporter = SILENT
    gather: bool = True
    record: bool = False
    source: Collector | None = None
    groups: list[InputStatistics] = field(default_factory=list)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)
    _group: dict[str, InputStatistics] = field(default_factory=dict)
    _first: dict[tuple[Any, ...], tuple[InputStatistics, torch.Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, one run of the block adds to the statistics."""
        handles = [
            linear.module.register_forward_pre_hook(self._hook(linear), with_kwargs=True) for linear in self.linears
        ]
        self.rows.clear()
        self.tokens.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._first.clear()

    def finish(self) -> None:
        """End the statistics: groups in the order of the block's modules, also of experts that no token reached."""
        unreached: dict[tuple[int, bool], InputStatistics] = {}
        for linear in self.linears:
            if linear.expert is None or linear.local in self._group:
                continue
            place = id(linear.expert), linear.module is linear.expert.outer
            if place in unreached:
                unreached[place].linears.append(linear)
            else:
                unreached[place] = self._new_group(linear, linear.weight)
            self._group[linear.local] = unreached[place]
        places = {linear.local: place for place, linear in enumerate(self.linears)}
        self.groups.sort(key=lambda group: places[group.linears[0].local])
        for group in self.groups:
            group.finish()

    def unread(self) -> list[str]:
        """Linears that no token has reached."""
        return [linear.local for linear in self.linears if linear.local not in self._group]

    def _new_group(self, linear: Linear, like: torch.Tensor) -> InputStatistics:
        size = like.shape[-1] if self.gather else 0
        group = InputStatistics([linear], torch.zeros(size, size, device=like.device))
        self.groups.append(group)
        return group

    def _hook(self, linear: Linear) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            inputs: torch.Tensor = arguments[0] if arguments else next(iter(keywords.values()))
            if linear.local in self._group:
                if self._group[linear.local].linears[0] is linear:
                    self._take(linear, inputs)
                return
            identity = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride())
            known = self._first.get(identity)
            if known is not None:
                known[0].linears.append(linear)
                self._group[linear.local] = known[0]
                return
            group = self._new_group(linear, inputs)
            self._group[linear.local] = group
            self._first[identity] = (group, inputs)
            self._take(linear, inputs)

        return hook

    def _take(self, linear: Linear, inputs: torch.Tensor) -> None:
        with self.reporter.stage("statistics"):
            rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
            if self.record:
                self.rows[linear.local] = rows
                if linear.expert is not None:
                    self.tokens[linear.local] = linear.expert.tokens
            if self.gather:
                self._group[linear.local].add(rows, self._meant(linear, rows) if self.source else None)

    def _meant(self, linear: Linear, rows: torch.Tensor) -> torch.Tensor:
        """What the source has in place of ``rows``. A token that the source sends to another expert has nothing there:
        its row stands for itself, so that it drifts by nothing."""
        assert self.source is not None
        theirs = self.source.rows.get(linear.local)
        if linear.expert is None:
            assert theirs is not None
            return theirs
        if theirs is None:
            return rows
        here, there = linear.expert.tokens, self.source.tokens[linear.local]
        place = torch.searchsorted(there, here).clamp(max=len(there) - 1)  # tokens rise
        return torch.where((there[place] == here)[:, None], theirs[place], rows)
