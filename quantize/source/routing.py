"""Find the routers of mixtures of experts by the names and shapes of their tensors. Imports no torch.

A router scores the experts of its block; a shared expert's gate scales that expert's output. Both are small, everything
downstream depends on them, and every loader expects them unquantized, so they are never quantized.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from quantize.formats.tensors import TensorSpec

_EXPERT = re.compile(r"^(?P<mixture>.+)\.(experts|input_linear|output_linear)\.(?P<number>\d+)\.(?P<rest>.+)$")


def expert_of(name: str) -> tuple[str, int, str] | None:
    """``model.layers.0.mlp.experts.3.up_proj.weight`` -> (``model.layers.0.mlp``, 3, ``up_proj.weight``), else None."""
    match = _EXPERT.match(name)
    return (match["mixture"], int(match["number"]), match["rest"]) if match else None


def find_routers(tensors: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Names of the weights of routers and of shared experts' gates.

    These are the two-dimensional weights beside numbered experts with one output per expert, or just one output.
    """
    experts: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if found := expert_of(name):
            experts[found[0]].add(found[1])
    if not experts:
        return frozenset()
    routers = set()
    for name, spec in tensors.items():
        if len(spec.shape) == 2 and name.endswith(".weight") and expert_of(name) is None:
            above = name.split(".")
            mixtures = (".".join(above[:length]) for length in range(len(above) - 2, 0, -1))
            mixture = next((mixture for mixture in mixtures if mixture in experts), None)
            if mixture is not None and spec.shape[0] in (1, len(experts[mixture])):
                routers.add(name)
    return frozenset(routers)
