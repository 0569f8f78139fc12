"""AWQ: the container's bytes, the search of scales, what they fold into, and whole branches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import write_model, write_recipe
from transformers import AutoModelForCausalLM

import quantize
import quantize.errors
from quantize.calibration.folding import Fold, find_folds
from quantize.calibration.forward import Activations, block_statistics
from quantize.formats import awq
from quantize.formats.reader import BranchReader
from quantize.methods.awq import AwqParameters, divided, quantize_scaled, search_scales
from quantize.recipe.schema import Model
from quantize.source.linear import Linear
from quantize.source.resolve import resolve
from quantize.source.streamed import StreamedModel

BODY = (
    "  variants: [{bits: 4, group_size: 32}]\nawq:\n  group_size: 32\n  variants:\n    - {}\n    - {group_size: 64}\n"
)


# -- the container


def slow_pack(codes: np.ndarray) -> list[list[int]]:
    """From the layout's description, word by word in Python's integers."""
    words = []
    for row in codes:
        words.append([])
        for start in range(0, len(row), 8):
            eight = row[start : start + 8]
            nibbles = [eight[0], eight[2], eight[4], eight[6], eight[1], eight[3], eight[5], eight[7]]
            word = sum(int(nibble) * 16**position for position, nibble in enumerate(nibbles))
            words[-1].append(word - 2**32 if word >= 2**31 else word)
    return words


@given(rows=st.integers(1, 5), eights=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_equals_an_independent_slow_packer(rows: int, eights: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, 8 * eights), dtype=np.uint8)
    words = awq.pack(torch.from_numpy(codes))
    assert words.tolist() == slow_pack(codes)
    assert torch.equal(awq.unpack(words), torch.from_numpy(codes))


def test_the_interleave_order_worked_out_by_hand() -> None:
    words = awq.pack(torch.arange(8)[None])
    assert words.tolist() == [[0x75316420]]


def test_outputs_that_fill_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="12 outputs"):
        awq.pack(torch.zeros(4, 12))


def test_decoding_is_scale_times_code_minus_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 16, (2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, 16, generator=generator).half()
    weight = awq.decode(awq.encode(codes, scales, zeros))
    for output, channel in ((0, 0), (5, 31), (15, 32), (7, 63)):
        group = channel // 32
        expected = float(scales[group, output]) * (int(codes[output, channel]) - int(zeros[group, output]))
        assert float(weight[output, channel]) == pytest.approx(expected, abs=1e-6)


# -- the mathematics


def problem(rows: int = 48, columns: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs of which a few channels are far stronger than the rest."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(512, columns, generator=generator)
    inputs[:, ::9] *= 12
    return weight, inputs.t() @ inputs


def test_scaling_beats_plain_rounding_where_channels_differ() -> None:
    weight, hessian = problem()
    parameters = AwqParameters(32, rounding="nearest")
    found = search_scales(weight, hessian, parameters)
    assert found.ratio > 0
    scaled = quantize_scaled(weight, hessian, found.scale, parameters)
    plain = quantize_scaled(weight, hessian, torch.ones(64), parameters)
    assert float(scaled.row_error.sum()) < 0.8 * float(plain.row_error.sum())


def test_the_error_of_a_scaled_solve_is_that_of_the_unscaled_weight() -> None:
    weight, hessian = problem()
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    for rounding in ("nearest", "gptq"):
        solution = quantize_scaled(weight, hessian, scale, AwqParameters(32, rounding=rounding))
        difference = (weight - solution.dequantize() / scale).double()
        error = float(((difference @ hessian.double()) * difference).sum())
        assert float(solution.row_error.sum()) == pytest.approx(error, rel=1e-3)


def test_tied_channels_get_one_scale() -> None:
    weight, hessian = problem()
    ties = torch.arange(64) % 16
    scale = search_scales(weight, hessian, AwqParameters(32), ties).scale
    assert torch.equal(scale, scale[:16].repeat(4))


def test_dead_channels_keep_scale_one() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    found = search_scales(weight, hessian, AwqParameters(32))
    assert float(found.scale[5]) == 1
    assert bool(torch.isfinite(found.scale).all())
    assert quantize_scaled(weight, hessian, found.scale, AwqParameters(32)).dead_columns == 1
    nothing = search_scales(weight, torch.zeros(64, 64), AwqParameters(32))
    assert torch.equal(nothing.scale, torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_divided_norm_times_its_scale_is_the_norm(dtype: torch.dtype, plus_one: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(256, generator=generator).to(dtype)
    values[7] = -1 if plus_one else 0
    scale = (torch.randn(256, generator=generator) * 2).exp()
    stored, real = divided(values, scale, plus_one)
    assert stored.dtype == dtype
    offset = 1 if plus_one else 0
    torch.testing.assert_close((stored.float() + offset) * real, values.float() + offset, rtol=1e-6, atol=1e-7)
    assert float(real[7]) == 1
    assert bool((real > 0).all())


# -- folding

FOLDS = {
    "llama": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "up_proj"},
    "qwen2": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "up_proj"},
    "qwen3": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "up_proj"},
    "gemma2": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "pre_feedforward_layernorm",
               "down_proj": "up_proj"},
    "gemma3_text": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "pre_feedforward_layernorm",
                    "down_proj": "up_proj"},
    "phi3": {"qkv_proj": "input_layernorm", "o_proj": "qkv_proj", "gate_up_proj": "post_attention_layernorm",
             "down_proj": "gate_up_proj"},
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"},
    "gpt_neox": {"query_key_value": "input_layernorm", "dense": "query_key_value",
                 "dense_h_to_4h": "post_attention_layernorm", "dense_4h_to_h": None},
    "falcon": {"query_key_value": "input_layernorm", "dense": "query_key_value", "dense_4h_to_h": None},
    "olmo2": {"q_proj": None, "o_proj": "v_proj", "gate_proj": None, "down_proj": "up_proj"},
}  # fmt: skip


def streamed(folder: Path) -> tuple[StreamedModel, Activations]:
    source = resolve(Model(source=str(folder)), weights=True)
    model = StreamedModel(source, torch.float32, torch.device("cpu"))
    ids = torch.randint(3, 380, (2, 32), generator=torch.Generator().manual_seed(1)).numpy()
    return model, Activations(model, ids, 2)


def leaf(name: str | None) -> str | None:
    return name.rsplit(".", 1)[-1] if name else None


@pytest.mark.parametrize("architecture", FOLDS)
@torch.no_grad()
def test_folds_are_found_and_keep_the_float_output(tmp_path: Path, architecture: str) -> None:
    folder = write_model(tmp_path / "m", architecture, dtype=torch.float32)
    model, source = streamed(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = whole(source.ids).logits
    for index in range(len(model)):
        with model.block(index) as block:
            entered = source.first()
            groups, _ = block_statistics(index, block, source)
            folds = find_folds(model, index, block, groups, hidden=entered)
            named = {leaf(leader): leaf(fold.producer if fold else None) for leader, fold in folds.items()}
            assert named == FOLDS[architecture]
            for group in groups:
                fold = folds[group.linears[0].local]
                if fold is not None:
                    prefix = f"{model.block_prefix}{index}."
                    consumers = [whole.get_submodule(prefix + linear.local) for linear in group.linears]
                    scale_away(whole.get_submodule(prefix + fold.producer), consumers, fold)
    after = whole(source.ids).logits
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


@torch.no_grad()
def scale_away(producer: torch.nn.Module, consumers: list[torch.nn.Module], fold: Fold) -> None:
    outputs = int(fold.rows.max()) + 1 if fold.norm else Linear("", producer).weight.shape[0]
    scale = torch.ones(outputs)
    scale[fold.rows] = torch.rand(outputs, generator=torch.Generator().manual_seed(5))[fold.rows] + 0.5
    if fold.norm:
        producer.weight.data, real = divided(producer.weight.data, scale, fold.plus_one)
    else:
        real = scale
        Linear("", producer).set_weight(Linear("", producer).weight / scale[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.data /= real
    for consumer in consumers:
        Linear("", consumer).set_weight(Linear("", consumer).weight * real[fold.rows])


# -- whole branches


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    recipe = quantize.load_recipe(write_recipe(folder / "recipe.yaml", tiny_llama, BODY))
    result = quantize.build(recipe, quantize.BuildOptions(dist=folder / "dist", device="cpu"))
    assert result.built == ["gptq/main", "awq/main", "awq/awq-4bit-64g"]
    return folder / "dist" / f"{tiny_llama.name}-AWQ"


def test_branches_and_their_configs(built: Path) -> None:
    for branch, group_size in (("main", 32), ("awq-4bit-64g", 64)):
        config = json.loads((built / branch / "config.json").read_text())["quantization_config"]
        own = json.loads((built / branch / "quant_config.json").read_text())
        assert (config["quant_method"], config["bits"], config["group_size"]) == ("awq", 4, group_size)
        assert (config["version"], config["zero_point"]) == ("gemm", True)
        assert own == {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM",
                       "modules_to_not_convert": None}  # fmt: skip
        tensors = load_file(built / branch / "model.safetensors")
        assert tensors["model.layers.0.mlp.down_proj.qweight"].shape == (256, 128 // 8)
        assert tensors["model.layers.0.mlp.down_proj.scales"].shape == (256 // group_size, 128)


def test_the_ledger_names_what_took_each_scale(built: Path) -> None:
    ledger = json.loads((built / "main" / "quantize-manifest.json").read_text())["ledger"]
    folded = {row["module"]: row["scale_folded_into"] for row in ledger}
    assert len(folded) == 21
    assert folded["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.up_proj"
    assert folded["model.layers.1.self_attn.k_proj"] == "model.layers.1.input_layernorm"
    assert all(row["outcome"] == "solved" and 0 <= row["scale_ratio"] <= 1 for row in ledger)


def test_a_weight_times_what_its_norm_lost_is_the_sources(built: Path, tiny_llama: Path) -> None:
    source, branch = (load_file(folder / "model.safetensors") for folder in (tiny_llama, built / "main"))
    reader, gains = BranchReader(built / "main"), []
    for block in range(3):
        for name, linear in (("post_attention_layernorm", "mlp.gate_proj"), ("input_layernorm", "self_attn.q_proj")):
            norm, module = f"model.layers.{block}.{name}.weight", f"model.layers.{block}.{linear}"
            lost = branch[norm].float() / source[norm].float()
            weight, expected = reader.weight(module), source[f"{module}.weight"].float()
            with_it, without = (float((found - expected).norm()) for found in (weight * lost, weight))
            assert with_it <= without * (1 + 1e-6)
            gains.append((float(lost.std()), with_it / without))
    assert max(gains)[1] < 0.9  # where a norm lost most


@torch.no_grad()
def test_the_branch_answers_nearly_as_its_source(built: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.randint(3, 380, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits.log_softmax(-1)
    tensors = load_file(built / "main" / "model.safetensors")
    reader = BranchReader(built / "main")
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        parameter.copy_(reader.weight(module) if f"{module}.qweight" in tensors else tensors[name].float())
    found = model(ids).logits.log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.02


def test_gptq_branches_are_the_same_with_awq_beside_them(built: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = quantize.load_recipe(write_recipe(tmp_path / "r.yaml", tiny_llama))
    quantize.build(recipe, quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    name = f"{tiny_llama.name}-GPTQ/main/model.safetensors"
    assert (tmp_path / "dist" / name).read_bytes() == (built.parent / name).read_bytes()


def test_a_dead_channel_is_recorded_and_harmless(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "dead"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    body = "  variants: [{group_size: 32}]\nawq:\n  variants: [{group_size: 32}]\n"
    recipe = quantize.load_recipe(write_recipe(tmp_path / "r.yaml", folder, body))
    result = quantize.build(recipe, quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    assert result.oddities["awq/main"]["dead_columns"] == [
        f"model.layers.1.self_attn.{name}_proj" for name in ("q", "k", "v")
    ]
    weight = BranchReader(tmp_path / "dist" / "dead-AWQ" / "main").weight("model.layers.1.self_attn.q_proj")
    assert bool(torch.isfinite(weight).all())


def test_what_nothing_can_take_is_unscaled_and_said(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "olmo2")  # whose projections read the residual stream itself
    body = "  variants: [{group_size: 32}]\nawq:\n  variants: [{group_size: 32}]\n"
    path = write_recipe(tmp_path / "r.yaml", folder, body)
    result = quantize.build(quantize.load_recipe(path), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    assert result.oddities["awq/main"]["unscaled"] == [
        f"model.layers.{index}.{name}"
        for index in range(3)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    strict = quantize.load_recipe(path, ["awq.fail_on=[unscaled]"])
    with pytest.raises(quantize.errors.SolveError, match=r"unscaled, which awq\.fail_on"):
        quantize.build(strict, quantize.BuildOptions(dist=tmp_path / "other", device="cpu"))


# -- bad input


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("awq: {variants: [{group_size: 48}]}", "must be one of -1, 32, 64, 128"),
        ("awq: {variants: [{bits: 3}]}", "awq.variants[0].bits"),
        ("awq: {variants: [{group_size: 32}, {group_size: 32, branch: Main}]}", "gives the branch 'Main'"),
        ("awq: {variants: [{zero_points: true}]}", "did you mean 'zero_point'?"),
        ("awq: {}", "lists no variants"),
        ("awq: {version: gemv, variants: [{}]}", "awq.version"),
        ("", "asks for nothing"),
    ],
)
def test_bad_sections_are_one_sentence(
    tiny_llama: Path, tmp_path: Path, invoke: Command, section: str, message: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{source: {tiny_llama}}}\n{section}\n")
    result = invoke("validate", path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_group_size_that_does_not_divide_is_refused_at_plan_time(tmp_path: Path, invoke: Command) -> None:
    folder = write_model(
        tmp_path / "m", hidden_size=96, intermediate_size=192, num_attention_heads=3, num_key_value_heads=3
    )
    path = tmp_path / "r.yaml"
    calibration = "calibration: {sequence_length: 64}"
    path.write_text(f"model: {{source: {folder}}}\nawq: {{variants: [{{group_size: 64}}]}}\n{calibration}\n")
    result = invoke("plan", path, "--dist", tmp_path / "dist")
    assert result.returncode == 2
    assert "group_size 64 does not divide the 96 inputs" in result.stderr
    assert "use 32 or -1" in result.stderr
