"""Experts in a GGUF: llama.cpp's converter stacks each projection of all experts of a block into one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from quantize.source.routing import expert_of

STACKED = {
    "ffn_gate_exps": ("gate_proj", "w1"),
    "ffn_up_exps": ("up_proj", "w3"),
    "ffn_down_exps": ("down_proj", "w2"),
}
"""llama.cpp's names of the stacks, and the checkpoint names of the experts' linears in each."""


def find_stacks(converted: Mapping[str, list[str]]) -> dict[tuple[str, str], str]:
    """The stacked GGUF tensor ``[experts, N, K]`` for each (mixture, linear of its experts) of the checkpoint.

    The converter outputs all stacks of a block together with the last of its experts' tensors.

    Args:
        converted: for each tensor of the checkpoint, the GGUF tensors output with it.
    """
    found: dict[tuple[str, str], str] = {}
    for name, targets in converted.items():
        if expert := expert_of(name):
            for target in targets:
                for leaf in STACKED.get(target.removesuffix(".weight").rpartition(".")[2], ()):
                    found[expert[0], leaf] = target
    return found


def targets_of(linears: Iterable[str], converted: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The checkpoint linears that each GGUF weight was converted from: one, or those of a stack in order."""
    stacks = find_stacks(converted)
    found: dict[str, list[str]] = {}
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for linear in linears:
        expert = expert_of(linear)
        stack = stacks.get((expert[0], expert[2])) if expert else None
        if expert and stack:
            members[stack][expert[1]] = linear
            continue
        for target in converted.get(f"{linear}.weight", []):
            if target.endswith(".weight"):
                found[target] = [linear]
    return found | {stack: [linear for _, linear in sorted(experts.items())] for stack, experts in members.items()}
