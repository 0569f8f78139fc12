"""Find the weights of quantizable linears in a checkpoint, from names and shapes alone.

A decoder's blocks are the longest numbered run of modules with two-dimensional weights (``model.layers.0 ...``). Every
two-dimensional ``.weight`` inside a block is a linear, except the routers of experts (``source/routing.py``): norms
have one dimension, embeddings are outside. The build checks this against the real modules before it starts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from quantize.errors import PlanError
from quantize.formats.tensors import TensorSpec
from quantize.source.checkpoint import Checkpoint
from quantize.source.routing import expert_of, find_routers

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Architectures whose linears are transformers' ``Conv1D``: weights stored [in_features, out_features]."""

SCALED_ACTIVATIONS = {
    "starcoder2": ("act", "c_fc"),
    "falcon": ("act", "dense_h_to_4h"),
    "mpt": ("act", "up_proj"),
    "gptj": ("act", "fc_in"),
    "gpt_neox": ("act", "dense_h_to_4h"),
    "gpt_bigcode": ("act", "c_fc"),
    "bloom": ("gelu_impl", "dense_h_to_4h"),
}
"""Architectures for which AWQ loaders divide the output of an activation by ``<activation>.scales``: the activation's
name, and the linear before it, with as many outputs as there are scales."""

_NUMBERED = re.compile(r"^(?P<prefix>.*?)(?P<index>[0-9]{1,6})\.(?P<rest>.+)$")


@dataclass(frozen=True)
class LinearSpec:
    """A linear as stored in a checkpoint.

    Attributes:
        name: module name in the checkpoint, without ``.weight``.
        block: index of its block; ``local`` is its name inside the block.
        in_features, out_features: K and N.
        bias: dtype of its bias, or None.
        weight: the stored weight tensor.
        share: fraction of all tokens that reach it, less than 1 for an expert's.
        transposed: whether its weight is stored [in_features, out_features], as a Conv1D does; never told by the shape.
    """

    name: str
    block: int
    local: str
    in_features: int
    out_features: int
    bias: str | None
    weight: TensorSpec
    share: float = 1.0
    transposed: bool = False


@dataclass(frozen=True)
class ModuleTable:
    """All linears of all blocks, in block order and file order, and the routers of experts, which stay unquantized."""

    prefix: str
    blocks: int
    linears: tuple[LinearSpec, ...]
    routers: tuple[str, ...] = ()

    @cached_property
    def quantized_tensors(self) -> frozenset[str]:
        """Names of the source tensors that quantization replaces: weights, and biases (rewritten as float16)."""
        names = {f"{linear.name}.weight" for linear in self.linears}
        return frozenset(names | {f"{linear.name}.bias" for linear in self.linears if linear.bias})

    def activation_scales(self, model_type: str) -> dict[str, int]:
        """Names and lengths of the activation scales that an AWQ loader expects for this architecture."""
        activation, before = SCALED_ACTIVATIONS.get(model_type, ("", ""))
        return {
            f"{linear.name.removesuffix(before)}{activation}.scales": linear.out_features
            for linear in self.linears
            if before and linear.name.rpartition(".")[2] == before
        }

    @cached_property
    def kinds(self) -> list[str]:
        """Names of the linears inside a block, in file order; an expert's by its last part, as in ``up_proj``."""
        names = (expert_of(linear.local) for linear in self.linears)
        return list(dict.fromkeys(e[2] if e else linear.local for e, linear in zip(names, self.linears, strict=True)))

    def is_in_block(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a block."""
        return name.startswith(self.prefix) and name[len(self.prefix) :].partition(".")[0].isdecimal()

    def beside_linears(self, checkpoint: Checkpoint, block: int) -> list[str]:
        """Names of a block's tensors that quantization does not replace, such as norms."""
        inside = f"{self.prefix}{block}."
        return [name for name in checkpoint.tensors if name.startswith(inside) and name not in self.quantized_tensors]


def find_linears(checkpoint: Checkpoint) -> ModuleTable:
    """Find the blocks and their linears.

    Raises:
        PlanError: there are no numbered blocks, or their weights are not plain linears (such as fused experts).
    """
    runs: dict[str, set[int]] = defaultdict(set)
    for name, spec in checkpoint.tensors.items():
        match = _NUMBERED.match(name)
        if match and len(spec.shape) == 2 and name.endswith(".weight"):
            runs[match["prefix"]].add(int(match["index"]))
    if not runs:
        raise PlanError(_unknown(checkpoint, "has no numbered decoder blocks with linear weights"))
    prefix = max(runs, key=lambda run: (len(runs[run]), -len(run)))
    count = checkpoint.size("num_hidden_layers", "n_layer")
    if runs[prefix] != set(range(len(runs[prefix]))) or (count is not None and len(runs[prefix]) != count):
        raise PlanError(
            _unknown(checkpoint, f"its config says {count} blocks, its tensors {len(runs[prefix])} of '{prefix}N'")
        )
    linears = []
    routers, share = find_routers(checkpoint.tensors), _expert_share(checkpoint)
    for name, spec in checkpoint.tensors.items():
        if not name.startswith(prefix):
            continue
        index, _, rest = name[len(prefix) :].partition(".")
        if not index.isdecimal():
            continue
        if len(spec.shape) > 2 and spec.shape[-2] > 1 and _is_weight(rest, spec):
            raise PlanError(
                _unknown(
                    checkpoint,
                    f"{name} is {list(spec.shape)}: experts stacked in one tensor are not supported, only experts with "
                    "separate linears (like those of Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE)",
                )
            )
        if len(spec.shape) == 2 and rest.endswith(".weight") and name not in routers:
            linears.append(_linear(checkpoint, name, int(index), rest, spec=spec, share=share))
    linears.sort(key=lambda linear: linear.block)  # stable: file order within a block
    left = tuple(name.removesuffix(".weight") for name in checkpoint.tensors if name in routers)
    return ModuleTable(prefix, len(runs[prefix]), tuple(linears), left)


def _expert_share(checkpoint: Checkpoint) -> float:
    """The fraction of all tokens that an expert gets on average."""
    count = max((found[1] + 1 for name in checkpoint.tensors if (found := expert_of(name))), default=1)
    chosen = checkpoint.size("num_experts_per_tok")
    return min(1.0, chosen / count) if chosen else 1.0


def _linear(checkpoint: Checkpoint, name: str, block: int, rest: str, *, spec: TensorSpec, share: float) -> LinearSpec:
    transposed = checkpoint.model_type in CONV1D_TYPES
    in_features, out_features = spec.shape if transposed else reversed(spec.shape)
    module = name.removesuffix(".weight")
    bias = checkpoint.tensors.get(f"{module}.bias")
    return LinearSpec(
        module,
        block,
        rest.removesuffix(".weight"),
        in_features,
        out_features,
        bias.dtype if bias else None,
        spec,
        share if expert_of(rest) else 1.0,
        transposed,
    )


def _is_weight(rest: str, spec: TensorSpec) -> bool:
    """Whether a tensor is a weight: old GPT-2 files also contain causal masks, as [1, 1, n, n] buffers."""
    return not (rest.endswith((".bias", ".masked_bias", ".mask")) or spec.dtype in {"BOOL", "U8"})


def _unknown(checkpoint: Checkpoint, why: str) -> str:
    return f"architecture '{checkpoint.model_type}' cannot be quantized: {why}"
