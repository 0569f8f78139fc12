"""Exact layouts: what a linear takes in each format, where shards end, and which shapes are refused before any work."""

from __future__ import annotations

import re

import pytest
import torch

from quantize.errors import PlanError
from quantize.formats import awq, compressed, gptq
from quantize.formats.tensors import SINGLE_NAME, TensorSpec
from quantize.planning.modules import LinearSpec, ModuleTable
from quantize.planning.sizes import check_variant, dividing_group_sizes, linear_tensors, variant_layout
from quantize.recipe.methods import AwqVariant, GptqVariant, Variant
from quantize.source.checkpoint import Checkpoint

TORCH = {"I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16}


def linear(inputs: int, outputs: int, block: int = 0, bias: str | None = None) -> LinearSpec:
    local = "mlp.up_proj"
    return LinearSpec(
        f"model.layers.{block}.{local}", block, local, inputs, outputs, bias, TensorSpec("BF16", (outputs, inputs))
    )


def table(*linears: LinearSpec) -> ModuleTable:
    return ModuleTable("model.layers.", len({one.block for one in linears}), linears)


def planned(one: LinearSpec, variant: Variant) -> dict[str, torch.Tensor]:
    """The planned tensors of a linear, holding zeros, by the last part of their names."""
    specs = linear_tensors(one, variant)
    return {name.removeprefix(f"{one.name}."): torch.zeros(s.shape, dtype=TORCH[s.dtype]) for name, s in specs.items()}


# -- a linear's tensors are those that the decoder of the format reads


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planned_gptq_tensors_decode_to_the_weights_shape(bits: int, group_size: int) -> None:
    tensors = planned(linear(96, 64), GptqVariant(bits=bits, group_size=group_size))  # type: ignore[arg-type]
    assert gptq.decode(tensors, bits).shape == (64, 96)
    assert tensors["qzeros"].shape == (1 if group_size == -1 else 3, 64 * bits // 32)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_planned_awq_tensors_decode_to_the_weights_shape(group_size: int) -> None:
    tensors = planned(linear(96, 64), AwqVariant(group_size=group_size))
    assert awq.decode(tensors).shape == (64, 96)
    assert tensors["qzeros"].shape == (1 if group_size == -1 else 3, 8)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_planned_compressed_tensors_decode_to_the_weights_shape(bits: int, group_size: int, sym: bool) -> None:
    variant = GptqVariant(bits=bits, group_size=group_size, sym=sym, engine="llm-compressor")  # type: ignore[arg-type]
    tensors = planned(linear(96, 64), variant)
    tensors["weight_shape"] = torch.tensor([64, 96])
    assert compressed.decode(tensors, bits).shape == (64, 96)
    groups = 1 if group_size == -1 else 3
    assert tensors["weight_scale"].dtype == torch.bfloat16  # the model's
    # packed along the outputs, which a square linear with as many groups could hide
    assert sym or tensors["weight_zero_point"].shape == (64 * bits // 32, groups)
    assert sym == ("weight_zero_point" not in tensors)


@pytest.mark.parametrize(("bias", "wanted", "found"), [(None, False, False), (None, True, True), ("BF16", False, True)])
def test_a_bias_is_planned_where_there_is_one_or_zeros_are_asked_for(
    bias: str | None, wanted: bool, found: bool
) -> None:
    tensors = linear_tensors(linear(64, 32, bias=bias), GptqVariant(group_size=32), zero_bias=wanted)
    spec = tensors.get("model.layers.0.mlp.up_proj.bias")
    assert spec == (TensorSpec("F16", (32,)) if found else None)


# -- shards


def layout_of(sizes: list[int], limit: int) -> dict[str, list[str]]:
    """Names in each shard, of tensors of so many float16 numbers that are left as they are."""
    tensors = {f"t{number}": TensorSpec("F16", (size,)) for number, size in enumerate(sizes)}
    layout = variant_layout(Checkpoint({}, tensors), ModuleTable("m.", 0, ()), GptqVariant(), limit)
    assert layout.nbytes == 2 * sum(sizes)
    return {file: list(names) for file, names in layout.shards.items()}


def test_a_shard_is_filled_to_the_last_byte() -> None:
    assert layout_of([10, 20, 20], limit=100) == {SINGLE_NAME: ["t0", "t1", "t2"]}
    assert layout_of([10, 20, 21], limit=100) == {
        "model-00001-of-00002.safetensors": ["t0", "t1"],
        "model-00002-of-00002.safetensors": ["t2"],
    }


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([80], [["t0"]]),
        ([80, 10], [["t0"], ["t1"]]),
        ([10, 80, 10, 20], [["t0"], ["t1"], ["t2", "t3"]]),
        ([80, 90], [["t0"], ["t1"]]),
    ],
)
def test_a_tensor_larger_than_a_shard_has_one_of_its_own_and_none_is_empty(
    sizes: list[int], expected: list[list[str]]
) -> None:
    assert list(layout_of(sizes, limit=100).values()) == expected


def test_shards_of_a_branch_hold_its_tensors_and_no_replaced_one() -> None:
    one, norm = linear(64, 32, bias="BF16"), "model.layers.0.norm.weight"
    tensors = {f"{one.name}.weight": one.weight, f"{one.name}.bias": TensorSpec("BF16", (32,)),
               norm: TensorSpec("BF16", (64,), "elsewhere.safetensors")}  # fmt: skip
    layout = variant_layout(Checkpoint({}, tensors), table(one), GptqVariant(group_size=32), 10**9)
    (shard,) = layout.shards.values()
    ends = ("qweight", "qzeros", "scales", "g_idx", "bias")
    assert set(shard) == {norm, *(f"{one.name}.{end}" for end in ends)}
    assert shard[norm] == TensorSpec("BF16", (64,))


# -- refusals


def refusal(variant: Variant, *linears: LinearSpec) -> str:
    with pytest.raises(PlanError) as caught:
        check_variant(table(*linears), variant)
    return str(caught.value)


def test_a_group_size_that_does_not_divide_names_those_that_do() -> None:
    said = refusal(GptqVariant(group_size=128), linear(256, 64), linear(192, 64, block=1))
    assert "group_size 128 does not divide the 192 inputs of model.layers.1.mlp.up_proj" in said
    assert said.endswith("for this model use 64, 32, 16 or -1")
    assert refusal(AwqVariant(group_size=64), linear(96, 64)).endswith("for this model use 32 or -1")
    assert dividing_group_sizes(table(linear(7, 32))) == [-1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_that_are_no_multiple_of_32_are_refused_for_gptq(bits: int) -> None:
    said = refusal(GptqVariant(bits=bits, group_size=-1), linear(64, 64), linear(80, 64, block=1))  # type: ignore[arg-type]
    assert "model.layers.1.mlp.up_proj has 80 inputs, which is not a multiple of 32" in said
    check_variant(table(linear(80, 64)), AwqVariant(group_size=-1))  # packed along the outputs


@pytest.mark.parametrize(
    ("bits", "fits", "does_not"), [(2, 16, 24), (3, 32, 16), (4, 8, 12), (8, 4, 6)], ids=["2", "3", "4", "8"]
)
def test_zero_points_that_do_not_fill_words_are_refused_and_those_that_just_do_are_not(
    bits: int, fits: int, does_not: int
) -> None:
    variant = GptqVariant(bits=bits, group_size=32)  # type: ignore[arg-type]
    check_variant(table(linear(64, fits)), variant)
    assert gptq.decode(planned(linear(64, fits), variant), bits).shape == (fits, 64)
    said = refusal(variant, linear(64, does_not))
    assert re.search(rf"has {does_not} outputs, whose {bits}-bit zero points do not fill 32-bit words", said)


def test_awq_outputs_that_do_not_fill_words_are_refused() -> None:
    check_variant(table(linear(64, 8)), AwqVariant(group_size=32))
    assert "12 outputs, whose 4-bit zero points" in refusal(AwqVariant(group_size=32), linear(64, 12))
