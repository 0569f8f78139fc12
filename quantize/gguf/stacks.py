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
"""llama.cpp's names of the stacks, and what checkpoints call an expert's linear that goes into each."""


def find_stacks(became: Mapping[str, list[str]]) -> dict[tuple[str, str], str]:
    """For each (mixture, linear of its experts) of the checkpoint, the GGUF tensor ``[experts, N, K]`` of them.

    The converter hands on all stacks of a block with the last of its experts' tensors.

    Args:
        became: for each tensor of the checkpoint, the GGUF tensors that came with it.
    """
    found: dict[tuple[str, str], str] = {}
    for name, targets in became.items():
        if expert := expert_of(name):
            for target in targets:
                for leaf in STACKED.get(target.removesuffix(".weight").rpartition(".")[2], ()):
                    found[expert[0], leaf] = target
    return found


def targets_of(linears: Iterable[str], became: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """For each GGUF weight that linears of the checkpoint became, those linears: one, or a stack's in their order."""
    stacks = find_stacks(became)
    found: dict[str, list[str]] = {}
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for linear in linears:
        expert = expert_of(linear)
        stack = stacks.get((expert[0], expert[2])) if expert else None
        if expert and stack:
            members[stack][expert[1]] = linear
            continue
        for target in became.get(f"{linear}.weight", []):
            if target.endswith(".weight"):
                found[target] = [linear]
    return found | {stack: [linear for _, linear in sorted(experts.items())] for stack, experts in members.items()}
