"""Statistics of linear inputs, collected while a block runs: H = X^T X and the token count.

H serves every GPTQ permutation (Frantar et al. 2022, https://arxiv.org/abs/2210.17323), scores AWQ
candidates, and its diagonal is llama.cpp's importance matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantize.reporter import SILENT, Reporter
from quantize.source.linear import Linear

PANELS = 6  # more panels skip more of the upper triangle, but make narrower, slower products
NARROWEST = 96


def panels(size: int) -> list[tuple[int, int]]:
    """First and last row of the panels in which H is summed; each panel's columns end at its last row."""
    width = max(NARROWEST, -(-size // PANELS // 32) * 32)
    return [(first, min(first + width, size)) for first in range(0, size, width)]


def mirror(hessian: torch.Tensor) -> None:
    """Complete a matrix of which only the panels up to the diagonal are there, in place."""
    for first, last in panels(hessian.shape[0]):
        hessian[:first, first:last].copy_(hessian[first:last, :first].t())


@dataclass
class InputStatistics:
    """One distinct input of a block and the linears that read it.

    Attributes:
        linears: the linears that share this input (q/k/v, gate/up), in module order.
        hessian: X^T X over all tokens, float32 [in_features, in_features].
        drift: (S - X)^T X, where S is the source model's input of these linears; None if X is S.
        tokens: number of rows of X. With none (an expert that got no token), H is the identity, so that every method
            rounds to nearest.
    """

    linears: list[Linear]
    hessian: torch.Tensor
    drift: torch.Tensor | None = None
    tokens: int = 0

    def add(self, rows: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Add ``rows`` of X, float32 [rows, in_features], and the corresponding rows of the source's S.

        X^T X is symmetric, so only the panels up to the diagonal are computed; :meth:`finish` mirrors them.
        """
        for first, last in panels(rows.shape[-1]):
            self.hessian[first:last, :last].addmm_(rows[:, first:last].t(), rows[:, :last])
        if source is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.hessian)
            self.drift.addmm_((source - rows).t(), rows)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Mirror the lower panels to complete ``hessian``."""
        if not self.tokens:
            self.hessian.diagonal().fill_(1.0)
        mirror(self.hessian)

    def release(self) -> None:
        """Free the memory."""
        self.hessian, self.drift = torch.empty(0), None


@dataclass
class Collector:
    """Hooks a block's linears and collects one :class:`InputStatistics` per distinct input.

    Linears share an input if they receive the same tensor object in the first run that reaches them. During that run
    the inputs are kept alive, so that no two of them have the same address.

    Attributes:
        timed: measures the time that statistics take.
        gather: add to the statistics; False only observes.
        record: store the rows of the last run in ``rows``, by the first linear that reads them, and for experts'
            linears their token indices in ``tokens``.
        source: a recording collector that has just observed the source model's block on the same windows.
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
        """Context in which one run of the block adds to the statistics."""
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
        """Complete the statistics: groups in module order, including experts that no token reached."""
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
        """Names of the linears that no token has reached."""
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
                self._group[linear.local].add(rows, self._source_rows(linear, rows) if self.source else None)

    def _source_rows(self, linear: Linear, rows: torch.Tensor) -> torch.Tensor:
        """The source's rows that correspond to ``rows``. A token that the source routes to another expert has none: its
        own row is used, so that its drift is zero."""
        assert self.source is not None
        original = self.source.rows.get(linear.local)
        if linear.expert is None:
            assert original is not None
            return original
        if original is None:
            return rows
        here, there = linear.expert.tokens, self.source.tokens[linear.local]
        place = torch.searchsorted(there, here).clamp(max=len(there) - 1)  # token indices are ascending
        return torch.where((there[place] == here)[:, None], original[place], rows)
