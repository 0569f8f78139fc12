"""The exact tensors of a quantized checkpoint, known before any work: names, dtypes, shapes, shards, bytes.

In AutoGPTQ's checkpoint format, with K inputs, N outputs, b bits and G groups, a linear takes
``K*N*b/8`` (qweight) + ``G*N*b/8`` (qzeros) + ``2*G*N`` (scales) + ``4*K`` (g_idx) + ``2*N`` (bias) bytes.
AutoAWQ's GEMM layout has the same tensors except g_idx, packed along N; that of compressed-tensors is below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.errors import PlanError
from quantize.formats.tensors import SINGLE_NAME, TensorSpec
from quantize.planning.engines import layout_of
from quantize.planning.modules import LinearSpec, ModuleTable
from quantize.recipe.methods import AWQ_GROUP_SIZES, GROUP_SIZES, AwqVariant, GptqVariant, Variant
from quantize.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint, file by file.

    Attributes:
        shards: the tensors of each file in byte order, by file name.
    """

    shards: Mapping[str, Mapping[str, TensorSpec]]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, without headers."""
        return sum(spec.nbytes for tensors in self.shards.values() for spec in tensors.values())


def linear_tensors(linear: LinearSpec, variant: Variant, zero_bias: bool = False) -> dict[str, TensorSpec]:
    """The tensors that replace one linear's weight and bias."""
    rows, columns, bits = linear.in_features, linear.out_features, variant.bits
    groups = 1 if variant.group_size == -1 else rows // variant.group_size
    if layout_of(variant) == "compressed-tensors":
        return _compressed_tensors(linear, groups, bits, getattr(variant, "sym", True))
    along_inputs = isinstance(variant, GptqVariant)
    tensors = {
        "qweight": TensorSpec("I32", (rows * bits // 32, columns) if along_inputs else (rows, columns * bits // 32)),
        "qzeros": TensorSpec("I32", (groups, columns * bits // 32)),
        "scales": TensorSpec("F16", (groups, columns)),
    }
    if along_inputs:
        tensors["g_idx"] = TensorSpec("I32", (rows,))
    if linear.bias or zero_bias:
        tensors["bias"] = TensorSpec("F16", (columns,))
    return {f"{linear.name}.{suffix}": spec for suffix, spec in tensors.items()}


def _compressed_tensors(linear: LinearSpec, groups: int, bits: int, symmetric: bool) -> dict[str, TensorSpec]:
    """``pack-quantized``: packed along the inputs, scales in the model's dtype, bias unchanged."""
    rows, columns = linear.in_features, linear.out_features
    tensors = {
        "weight_packed": TensorSpec("I32", (columns, rows * bits // 32)),
        "weight_scale": TensorSpec(linear.weight.dtype, (columns, groups)),
        "weight_shape": TensorSpec("I64", (2,)),
    }
    if not symmetric:
        tensors["weight_zero_point"] = TensorSpec("I32", (columns * bits // 32, groups))
    if linear.bias:
        tensors["bias"] = TensorSpec(linear.bias, (columns,))
    return {f"{linear.name}.{suffix}": spec for suffix, spec in tensors.items()}


def variant_layout(
    checkpoint: Checkpoint,
    table: ModuleTable,
    variant: Variant,
    max_shard_size: int,
    zero_bias: bool = False,
) -> Layout:
    """All tensors of one branch, spread over shards of at most ``max_shard_size`` bytes of data."""
    by_weight = {f"{linear.name}.weight": linear for linear in table.linears}
    replaced = table.quantized_tensors
    tensors: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        if name in by_weight:
            tensors.update(linear_tensors(by_weight[name], variant, zero_bias))
        elif name not in replaced:
            tensors[name] = TensorSpec(spec.dtype, spec.shape)
    if isinstance(variant, AwqVariant):
        for name, length in table.activation_scales(checkpoint.model_type).items():
            tensors[name] = TensorSpec("F16", (length,))
    return Layout(_shards(tensors, max_shard_size))


def check_variant(table: ModuleTable, variant: Variant) -> None:
    """Refuse a variant that no loader could read.

    Raises:
        PlanError: in_features is not divisible by group_size, or a shape does not fill 32-bit words; the message names
            the module, and the group sizes that would work.
    """
    known = GROUP_SIZES if isinstance(variant, GptqVariant) else AWQ_GROUP_SIZES
    for linear in table.linears:
        rows, columns, bits = linear.in_features, linear.out_features, variant.bits
        if variant.group_size != -1 and rows % variant.group_size:
            raise PlanError(
                f"group_size {variant.group_size} does not divide the {rows} inputs of {linear.name}; "
                f"for this model use {_listing(dividing_group_sizes(table, known))}"
            )
        if rows % 32 and isinstance(variant, GptqVariant):
            raise PlanError(
                f"{linear.name} has {rows} inputs, which is not a multiple of 32, so its codes do not fill the "
                "32-bit words of the GPTQ format; no loader reads such a module"
            )
        if columns * bits % 32:
            raise PlanError(
                f"{linear.name} has {columns} outputs, whose {bits}-bit zero points do not fill 32-bit words; "
                f"use a width whose bits times {columns} divide by 32"
            )


def dividing_group_sizes(table: ModuleTable, known: Sequence[int] = GROUP_SIZES) -> list[int]:
    """The group sizes that divide the inputs of every linear, largest first, then -1."""
    inputs = {linear.in_features for linear in table.linears}
    sizes = [size for size in known if size > 0 and all(rows % size == 0 for rows in inputs)]
    return [*sorted(sizes, reverse=True), -1]


def _listing(sizes: Sequence[int]) -> str:
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shards(tensors: Mapping[str, TensorSpec], limit: int) -> dict[str, dict[str, TensorSpec]]:
    files: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for name, spec in tensors.items():
        if files[-1] and used + spec.nbytes > limit:
            files.append({})
            used = 0
        files[-1][name] = spec
        used += spec.nbytes
    if len(files) == 1:
        names = [SINGLE_NAME]
    else:
        names = [f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" for index in range(len(files))]
    return dict(zip(names, files, strict=True))
