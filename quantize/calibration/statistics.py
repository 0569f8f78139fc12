"""Statistics of linear inputs, gathered while a block runs: H = X^T X and the token count.

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

from quantize.source.streamed import Linear

PANELS = 6  # more panels leave out more of the upper half, but make narrower, slower products
NARROWEST = 96


def _panels(size: int) -> list[tuple[int, int]]:
    width = max(NARROWEST, -(-size // PANELS // 32) * 32)
    return [(first, min(first + width, size)) for first in range(0, size, width)]


@dataclass
class InputStatistics:
    """One distinct input of a block and the linears that read it.

    Attributes:
        linears: the linears that share this input (q/k/v, gate/up), in module order.
        hessian: X^T X over all tokens, float32 [in_features, in_features].
        tokens: rows of X so far.
    """

    linears: list[Linear]
    hessian: torch.Tensor
    tokens: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add the rows of ``inputs`` [..., in_features].

        X^T X is symmetric, so only panels up to the diagonal are computed; :meth:`finish` mirrors them.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        for first, last in _panels(rows.shape[-1]):
            self.hessian[first:last, :last].addmm_(rows[:, first:last].t(), rows[:, :last])
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Mirror the lower panels, so that ``hessian`` is whole."""
        for first, last in _panels(self.hessian.shape[0]):
            self.hessian[:first, first:last].copy_(self.hessian[first:last, :first].t())


@dataclass
class Collector:
    """Hooks a block's linears and gathers one :class:`InputStatistics` per distinct input.

    Which linears share an input is seen in the first run: they are handed the very same tensor. While that
    run lasts, all inputs are kept, so that no two of them can lie at one address.
    """

    linears: Sequence[Linear]
    groups: list[InputStatistics] = field(default_factory=list)
    _leader: dict[str, InputStatistics] = field(default_factory=dict)
    _first: dict[tuple[Any, ...], tuple[InputStatistics, torch.Tensor]] | None = field(default_factory=dict)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, every run of the block adds to the statistics."""
        handles = [
            linear.module.register_forward_pre_hook(self._hook(linear), with_kwargs=True) for linear in self.linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_of_run(self) -> None:
        """Call after each run of the block; after the first one the sharing of inputs is settled."""
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
                    self._leader[linear.local].add(inputs)
                return
            identity = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride())
            known = self._first.get(identity)
            if known is not None:
                known[0].linears.append(linear)
                return
            size = inputs.shape[-1]
            group = InputStatistics([linear], torch.zeros(size, size, device=inputs.device))
            self.groups.append(group)
            self._leader[linear.local] = group
            self._first[identity] = (group, inputs)
            group.add(inputs)

        return hook
