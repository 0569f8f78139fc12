"""GGUF of architectures whose converter does more than rename (it splits, delegates, leaves out), and GGUF sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from conftest import Command
from tiny import small_wide_model, wide_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import quantize
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.gguf.imatrix import read_importance

pytestmark = [*needs.LLAMA_CPP, pytest.mark.usefixtures("forked_converter")]
RECIPE = """\
model: {{source: {source}, name: Small}}
calibration: {{dataset: pydoc, samples: 4, sequence_length: 64, compute_dtype: float32}}
gguf: {{levels: [Q8_0]{more}}}
"""
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MLA = {
    **NARROW, "architecture": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip


def write(path: Path, source: Path, more: str = "") -> Path:
    path.write_text(RECIPE.format(source=source, more=more))
    return path


def build(folder: Path, source: Path, more: str = "") -> tuple[Any, dict[str, Any]]:
    """The plan that was built, and its manifest."""
    loaded = quantize.load_recipe(write(folder / "r.yaml", source, more))
    plan = quantize.build(loaded, quantize.BuildOptions(dist=folder / "dist", device="cpu")).plan
    assert plan.gguf
    return plan, json.loads((plan.gguf.folder / "quantize-manifest.json").read_text())


@torch.no_grad()
def test_the_halves_of_kv_b_get_the_importance_of_their_own_inputs(tokenizer_folder: Path, tmp_path: Path) -> None:
    """MLA: the key half is transposed, so that its inputs are the queries without their rotated part."""
    source = wide_model(tmp_path / "small", tokenizer_folder, **MLA)
    plan, manifest = build(tmp_path, source)
    # transformers writes the count of such layers into the config, and saves none
    assert manifest["conversion"]["notes"] == [
        "the checkpoint has no layers that predict further tokens (NextN, MTP), so the GGUF has none"
    ]
    importance = read_importance(plan.gguf.folder / "small-imatrix.gguf")
    ids = torch.from_numpy(sample_tokens(plan.recipe.calibration, load_tokenizer(plan.source)).ids)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    attention = model.model.layers[1].self_attn
    attention.q_b_proj.register_forward_hook(lambda module, inputs, output: seen.update(queries=output))
    attention.kv_b_proj.register_forward_hook(lambda module, inputs, output: seen.update(latent=inputs[0]))
    model(ids)
    queries = seen["queries"].double().reshape(-1, 4 * 48).square().sum(dim=0).view(4, 48)[:, :32]
    latent = seen["latent"].double().reshape(-1, 32).square().sum(dim=0).expand(4, -1)
    for name, expected in {"attn_k_b": queries, "attn_v_b": latent}.items():
        found = torch.from_numpy(importance.sums[f"blk.1.{name}.weight"]).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
        assert importance.counts[f"blk.1.{name}.weight"].tolist() == [256] * 4


def test_dimensions_of_one_that_the_quantizer_drops_are_not_planned(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A shared expert's gate [H, 1]; with four blocks its headers' bytes are more than a file's alignment hides."""
    sizes = {
        **NARROW, "num_hidden_layers": 4, "num_experts": 4, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    source = wide_model(tmp_path / "small", tokenizer_folder, architecture="qwen2_moe", **sizes)
    plan, manifest = build(tmp_path, source, ", imatrix: false")
    (item,) = plan.gguf.levels
    assert item.nbytes == manifest["levels"]["Q8_0"]["files"][item.file]["bytes"]


def test_a_converter_that_delegates_to_an_inner_one(tmp_path: Path) -> None:
    yarn = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 256,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    source = small_wide_model(
        tmp_path / "small", architecture="ministral3", **NARROW, head_dim=32, rope_parameters=yarn
    )
    _, manifest = build(tmp_path, source, ", imatrix: false")
    assert manifest["conversion"]["kl_divergence"] < 1e-3


def test_what_llama_cpp_cannot_load_is_known_at_plan_by_its_own_reason(
    tokenizer_folder: Path, tmp_path: Path, invoke: Command
) -> None:
    sizes = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 96,
        "n_ctx": 256,
    }  # llama.cpp takes four times n_embd for granted
    source = wide_model(tmp_path / "small", tokenizer_folder, architecture="gpt2", **sizes)
    plan = invoke("plan", write(tmp_path / "r.yaml", source), "--dist", tmp_path / "dist", "--json")
    (level,) = json.loads(plan.stdout)["levels"]
    assert "cannot load the result: check_tensor_dims: tensor 'blk.0.ffn_" in level["why"]
    assert "has wrong shape" in level["why"]


def test_the_comparison_goes_beyond_a_sliding_window(tmp_path: Path) -> None:
    """llama.cpp knows Gemma 2's window, and none of Mistral's."""
    found = {}
    for architecture in ("gemma2", "mistral"):
        folder = tmp_path / architecture
        folder.mkdir()
        source = small_wide_model(
            folder / "small", architecture=architecture, **NARROW, head_dim=32, sliding_window=60,
            initializer_range=0.3,
        )  # fmt: skip
        found[architecture] = build(folder, source, ", imatrix: false")[1]["conversion"]
        assert found[architecture]["sliding_window"] == 60
    assert found["gemma2"]["kl_beyond_window"] < 0.01
    assert "notes" not in found["gemma2"]
    assert found["mistral"]["kl_divergence"] < 0.01
    assert "use at most 60 tokens of context" in found["mistral"]["notes"][0]


def test_an_encoder_is_planned_as_a_file_of_its_own_and_made_in_that_size(tmp_path: Path, invoke: Command) -> None:
    sizes = {**NARROW, "num_hidden_layers": 3}  # more than the encoder has
    source = small_wide_model(tmp_path / "small", architecture="gemma3_text", **sizes, head_dim=32)
    text = json.loads((source / "config.json").read_text())
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float16).save_pretrained(source)
    recipe = write(tmp_path / "r.yaml", source)
    words = invoke("plan", recipe, "--dist", tmp_path / "dist").stdout
    assert "text only, without an mmproj file: it looks for image_mean" in " ".join(words.split())
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=tmp_path / "dist"))
    assert plan.gguf
    assert plan.gguf.projector
    assert [item.file for item in plan.gguf.levels] == ["small-Q8_0.gguf", "mmproj-small-F16.gguf"]
    assert plan.gguf.projector.make().stat().st_size == plan.gguf.levels[1].nbytes


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
@torch.no_grad()
def test_gguf_files_of_other_families_are_the_models_that_they_were_made_of(
    architecture: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """transformers reads neither Qwen 3's width of heads nor Gemma's scale of queries."""
    sizes = {**NARROW, "architecture": architecture, "head_dim": 32, "query_pre_attn_scalar": 32}
    if architecture == "qwen3":
        source = wide_model(tmp_path / "small", tokenizer_folder, **sizes)
    else:
        source = small_wide_model(tmp_path / "small", **sizes)
    plan = quantize.plan(quantize.load_recipe(write(tmp_path / "r.yaml", source)))
    assert plan.gguf
    read = quantize.plan(quantize.load_recipe(write(tmp_path / "again.yaml", plan.gguf.conversion.make()))).source
    ids = torch.tensor([AutoTokenizer.from_pretrained(source)("Numbers 12345, and words.")["input_ids"]])
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
        for folder in (source, read.folder)
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-3)
