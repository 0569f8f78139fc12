"""The linears of a checkpoint's blocks that can be quantized, and what else is in the blocks.

Which tensors are linears of which block says the model itself, examined on the meta device (``source/anatomy.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from quantize.errors import PlanError
from quantize.formats.tensors import TensorSpec
from quantize.planning.left import Left, share_quantized, split_linears
from quantize.recipe.quantized import Quantized
from quantize.source.anatomy import Anatomy, Found
from quantize.source.checkpoint import Checkpoint
from quantize.source.routing import expert_of

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


@dataclass(frozen=True)
class LinearSpec:
    """A linear as stored in a checkpoint.

    Attributes:
        name: module name in the checkpoint, without ``.weight``.
        block: index of its block; ``local`` is its name inside the block, as in the checkpoint.
        in_features, out_features: K and N.
        bias: dtype of its bias, or None.
        weight: the stored weight tensor.
        share: fraction of all tokens that reach it, less than 1 for an expert's.
        transposed: whether its weight is stored [in_features, out_features], as transformers' ``Conv1D`` does.
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
    """All linears of all blocks, in block order and file order, and what stays in 16 bits.

    Attributes:
        prefix: what the names of blocks' tensors begin with, as in ``model.layers.``. inside: the block of each tensor.
        outside: shortest names of modules outside the blocks that hold linears, which stay as they are.
        is_renamed: whether transformers has the blocks below another name than the checkpoint.
    """

    prefix: str
    blocks: int
    linears: tuple[LinearSpec, ...]
    left: tuple[Left, ...] = ()
    inside: Mapping[str, int] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    is_renamed: bool = False

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
    def names(self) -> frozenset[str]:
        """Names of the linears in the checkpoint."""
        return frozenset(linear.name for linear in self.linears)

    @cached_property
    def share(self) -> float:
        """The part of the blocks' weights that is quantized, 0 to 1."""
        return share_quantized(sum(linear.in_features * linear.out_features for linear in self.linears), self.left)

    @cached_property
    def kinds(self) -> list[str]:
        """Names of the linears inside a block, in file order; an expert's by its last part, as in ``up_proj``."""
        names = (expert_of(linear.local) for linear in self.linears)
        return list(dict.fromkeys(e[2] if e else linear.local for e, linear in zip(names, self.linears, strict=True)))

    def is_in_block(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to a block."""
        return self.block_of(name) is not None

    def block_of(self, name: str) -> int | None:
        """The block that a tensor of the checkpoint belongs to, also one that the model does not read."""
        if name in self.inside:
            return self.inside[name]
        index = name[len(self.prefix) :].partition(".")[0] if self.prefix and name.startswith(self.prefix) else ""
        return int(index) if index.isdecimal() and int(index) < self.blocks else None

    def beside_linears(self, checkpoint: Checkpoint, block: int) -> list[str]:
        """Names of a block's tensors that quantization does not replace, such as norms."""
        return [
            name for name in checkpoint.tensors if name not in self.quantized_tensors and self.block_of(name) == block
        ]


def find_linears(checkpoint: Checkpoint, anatomy: Anatomy, asked: Quantized | None = None) -> ModuleTable:
    """The linears of a checkpoint's blocks.

    Args:
        asked: the recipe's choice.

    Raises:
        PlanError: its blocks have no linears that can be quantized, or see :func:`split_linears`.
    """
    split = split_linears(checkpoint, anatomy, asked or Quantized())
    share = _expert_share(checkpoint)
    order = {name: place for place, name in enumerate(checkpoint.tensors)}
    taken = sorted(
        split.taken,
        key=lambda found: (found.block, order[f"{found.name}.weight"]),
    )
    if not taken:
        raise PlanError(
            f"architecture '{checkpoint.model_type}' cannot be quantized: no linear of its {anatomy.blocks} blocks has "
            "a weight of its own in the checkpoint"
        )
    linears = tuple(_linear(checkpoint, found, anatomy.prefix, share) for found in taken)
    return ModuleTable(
        anatomy.prefix, anatomy.blocks, linears, split.left, anatomy.inside, anatomy.outside, anatomy.is_renamed
    )


def _expert_share(checkpoint: Checkpoint) -> float:
    """The fraction of all tokens that an expert gets on average."""
    count = max((found[1] + 1 for name in checkpoint.tensors if (found := expert_of(name))), default=1)
    chosen = checkpoint.size("num_experts_per_tok")
    return min(1.0, chosen / count) if chosen else 1.0


def _linear(checkpoint: Checkpoint, found: Found, prefix: str, share: float) -> LinearSpec:
    spec = checkpoint.tensors[f"{found.name}.weight"]
    out_features, in_features = reversed(spec.shape) if found.transposed else spec.shape
    bias = checkpoint.tensors.get(f"{found.name}.bias")
    return LinearSpec(
        found.name,
        found.block,
        found.name.removeprefix(f"{prefix}{found.block}."),
        in_features,
        out_features,
        bias.dtype if bias else None,
        spec,
        share if expert_of(found.name) else 1.0,
        found.transposed,
    )
