"""Mixtures of experts with one linear for every projection of every expert, as in checkpoints.

transformers 5 stacks the experts of a block into three-dimensional parameters. Here each such module is replaced by one
with plain linears, so that loading, statistics, solving and measuring treat them like all others. ``source/split.py``
finds the modules, and the names of the linears in the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

Gate = Callable[[torch.Tensor], torch.Tensor]


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``, with its linears under the checkpoint's names.

    Attributes:
        tokens: indices, ascending, of the rows of the mixture's input in the last call, int64 [rows].
        outer: the linear that reads the gated product; the others read the expert's input.
    """

    def __init__(self, inner: dict[str, nn.Linear], outer: dict[str, nn.Linear], gate: Gate) -> None:
        super().__init__()
        for name, linear in (inner | outer).items():
            self.add_module(name, linear)
        self._inner, self._outer, self._gate = tuple(inner), next(iter(outer)), gate
        self.tokens = torch.empty(0, dtype=torch.int64)

    @property
    def outer(self) -> nn.Module:
        return self.get_submodule(self._outer)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` [rows, width] -> [rows, width]."""
        # the inner linears get the same tensor object, by which statistics recognize their shared input
        hidden = torch.cat([self.get_submodule(name)(rows) for name in self._inner], dim=-1)
        output: torch.Tensor = self.outer(self._gate(hidden))
        return output


class Experts(nn.ModuleList):
    """The experts of one block, with the call signature of transformers' stacked module.

    Experts run in order and add to the output in that order; an expert without tokens does not run.

    Attributes:
        numbers: how many experts a router chooses from; more than there are if some only pass their input on.
    """

    numbers = 0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``hidden_states`` [tokens, width]; expert numbers and their weights, [tokens, k] -> [tokens, width]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            assert isinstance(expert, Expert)
            tokens, choice = torch.where(top_k_index == number)
            expert.tokens = tokens
            if len(tokens):
                rows = expert(hidden_states[tokens]) * top_k_weights[tokens, choice, None]
                output.index_add_(0, tokens, rows.to(output.dtype))
        return output


class PassingExperts(Experts):
    """Experts beyond whose numbers are others that answer with their input."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`Experts.forward`."""
        output = super().forward(hidden_states, top_k_index, top_k_weights)
        passed = (top_k_weights * (top_k_index >= len(self))).sum(dim=-1, keepdim=True)
        return output + (hidden_states * passed).to(output.dtype)


class DenseExperts(Experts):
    """Experts whose mixture hands every expert its own copy of all tokens, zero where the router did not choose it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """``hidden_states`` [experts * tokens, width] -> the same shape."""
        output = torch.zeros_like(hidden_states)
        rows = len(hidden_states) // len(self)
        for number, expert in enumerate(self):
            assert isinstance(expert, Expert)
            own = hidden_states[number * rows : (number + 1) * rows]
            expert.tokens = own.any(dim=-1).nonzero()[:, 0]
            if len(expert.tokens):
                output[number * rows + expert.tokens] = expert(own[expert.tokens])
        return output


@contextlib.contextmanager
def pinned_routing(block: nn.Module) -> Iterator[None]:
    """Context in which every run of a block routes its tokens like the first run, with the same weights.

    For comparing runs that should be equal: rounding alone can change a close choice of the router.
    """
    chosen: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def pin(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return arguments[0], *chosen.setdefault(module, arguments[1:])

    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, Experts):
                stack.callback(module.register_forward_pre_hook(pin).remove)
        yield
