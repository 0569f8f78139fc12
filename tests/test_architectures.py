"""One small model for each mechanism by which architectures differ: what is found, streamed, left, refused and read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from outcome import assert_refused
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.zaya import modeling_zaya

import quantize
from quantize.errors import SourceError
from quantize.recipe.schema import Model
from quantize.source.calls import HandedOn
from quantize.source.resolve import resolve
from quantize.source.stacked import from_mxfp4
from quantize.source.streamed import StreamedModel
from quantize.verifying.forward import logits_of

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
GEMMA_3N = {
    **TEXT, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "laurel_rank": 32,
    "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY,
    "sliding_window": 16,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
SPARSE = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
READ = "quantize: {unread_experts: true}"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # a vision tower with more blocks than the text has
    "image-text": ("gemma3", {"text_config": TEXT, "vision_config": {**VISION, "image_size": 56, "patch_size": 14}}),
    # copies of the states in a fourth dimension, arguments that depend on the tokens, keys and values handed on
    "handed-on": ("gemma3n_text", GEMMA_3N),
    "returns-list": ("openai-gpt", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "weight-read-outside": ("mamba", {**TEXT, "state_size": 16, "time_step_rank": 32, "hidden_size": 128}),
    "interleaved-experts": ("gpt_oss", {**SPARSE, "sliding_window": 16}),
    "fused-experts": ("granitemoe", SPARSE),
    # the states of a router go from block to block as an argument
    "states-in-arguments": ("zaya", {
        **TEXT, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 160, "router_hidden_size": 32,
        "tie_word_embeddings": True,
    }),
    # two numbers beyond the experts pass the input on
    "passing-experts": ("longcat_flash", {**TEXT, **LATENT, "n_routed_experts": 4, "zero_expert_num": 2,
        "moe_topk": 2, "num_layers": 1, "num_hidden_layers": 2, "head_dim": 16,
        "ffn_hidden_size": 96, "expert_ffn_hidden_size": 64,
    }),
    # three convolutions are joined on loading
    "joined-convolutions": ("bailing_hybrid", {
        **TEXT, **LATENT, "num_hidden_layers": 2, "layer_group_size": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_expert_group": 1, "topk_group": 1,
        "num_experts_per_token": 2,
    }),
    # two linears of a shared expert are joined on loading
    "joined-linears": ("minimax_m3_vl", {
        "text_config": {**TEXT, "dense_intermediate_size": 96, "rotary_dim": 16, "num_local_experts": 4,
            "num_experts_per_tok": 2, "intermediate_size": 64, "shared_intermediate_size": 64,
        },
        "projector_hidden_size": 64, "merged_hidden_size": 64,
        "vision_config": {**VISION, "image_size": 56, "patch_size": 14},
    }),
    # experts for text and experts for images share one run of numbers
    "two-stacks": ("ernie4_5_vl_moe", {
        "text_config": {**TEXT, "moe_intermediate_size": [64, 32], "moe_num_experts": 4, "moe_k": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
            "tie_word_embeddings": True,
        },
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
    }),
    # a block that only images reach
    "unreached-block": ("mllama", {
        "text_config": {**TEXT, "num_attention_heads": 2, "num_hidden_layers": 4, "cross_attention_layers": [2],
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "pad_token_id": 0,
        },
        "vision_config": {**VISION, "image_size": 56, "patch_size": 14, "max_num_tiles": 4},
    }),
    "dense-experts": ("llama4_text", {
        **SPARSE, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    }),
}  # fmt: skip


def write(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """A random model with a tokenizer; norms, biases and scales have the sizes that trained ones have."""
    loaded = AutoConfig.for_model(kind, **config)
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(loaded, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.uniform_(0.1, 2.0) if "norm" in name else parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write(tmp_path_factory.mktemp(name) / name, *MODELS[name])
        return made[name]

    return make


def recipe(folder: Path, source: Path, *more: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("\n".join([
        f"model: {{source: {source}, name: Small, creator: nobody, license: mit}}",
        "calibration: {dataset: pydoc, samples: 4, sequence_length: 32, batch_tokens: 64, compute_dtype: bfloat16}",
        "gptq: {variants: [{branch: main, bits: 8, group_size: 32}]}",
        *(more or [READ]),
    ]))  # fmt: skip
    return path


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_the_logits_of_the_whole_model(name: str, model_of: Callable[[str], Path]) -> None:
    source = resolve(Model(source=str(model_of(name))), weights=True)
    model = StreamedModel(source, torch.float32, torch.device("cpu"), head=True)
    windows = [torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    states = [model.embed(ids) for ids in windows]
    handed_on = [HandedOn() for _ in windows]
    for index in range(len(model)):
        with model.block(index) as block:
            states = [
                model.run(index, block, hidden, ids, left)
                for hidden, ids, left in zip(states, windows, handed_on, strict=True)
            ]
    whole = type(model.model).from_pretrained(source.folder, dtype=torch.float32).eval()
    for ids, hidden in zip(windows, states, strict=True):
        with torch.no_grad():
            wanted = whole(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model.logits(ids, hidden), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_built_answers_like_its_source(name: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """In 8 bits, with a pass in bfloat16, read back from the branch's own bytes."""
    source = model_of(name)
    loaded = quantize.load_recipe(recipe(tmp_path, source, "awq: {variants: [{branch: main, group_size: 32}]}", READ))
    plan = quantize.build(loaded, quantize.BuildOptions(dist=tmp_path / "dist", device="cpu")).plan
    model = StreamedModel(plan.source, torch.float32, torch.device("cpu"))
    whole = type(model.model).from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False).logits[0]
    eight, four = (logits_of(item.folder, ids[0].tolist()) for item in plan.variants)
    assert float((eight - wanted).norm() / wanted.norm()) < 0.2
    assert float((four - wanted).norm() / wanted.norm()) < 1.0
    assert plan.table.share > 0.9


def planned(invoke: Command, path: Path) -> dict[str, Any]:
    done = invoke("plan", path, "--dist", path.parent / "dist", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_vision_tower_stays_and_loaders_are_told(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    source = model_of("image-text")
    path = recipe(tmp_path, source, "awq: {variants: [{branch: main, group_size: 32}]}")
    assert invoke("build", path, "--dist", tmp_path / "dist").returncode == 0
    stored = load_file(source / "model.safetensors")
    for method in ("GPTQ", "AWQ"):
        branch = tmp_path / "dist" / f"image-text-{method}" / "main"
        tensors = load_file(branch / "model.safetensors")
        tower = [name for name in stored if "vision" in name]
        assert tower
        assert all(torch.equal(tensors[name], stored[name]) for name in tower)
        assert not [name for name in tensors if name.endswith("qweight") and "language" not in name]
        said = json.loads((branch / "config.json").read_text())["quantization_config"]
        if method == "AWQ":
            assert "vision_tower" in said["modules_to_not_convert"]
        else:
            assert any("vision_tower" in rule for rule in said["dynamic"])
        assert "`vision_tower`: outside the blocks" in (branch / "README.md").read_text()


def test_a_linear_that_other_code_reads_stays_with_its_reason(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    left = planned(invoke, recipe(tmp_path, model_of("weight-read-outside")))["left"]
    assert [(row["name"], row["count"]) for row in left if "read by other code" in row["reason"]] == [
        ("backbone.layers.N.mixer.dt_proj", 3)
    ]


def test_linears_joined_on_loading_are_quantized_under_their_own_names(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    source = model_of("joined-linears")
    assert invoke("build", recipe(tmp_path, source), "--dist", tmp_path / "dist").returncode == 0
    built = load_file(tmp_path / "dist" / "joined-linears-GPTQ" / "main" / "model.safetensors")
    stored = [name for name in load_file(source / "model.safetensors") if "shared_experts" in name]
    assert len(stored) == 9
    assert all(name.replace(".weight", ".qweight") in built for name in stored)


def test_a_router_may_choose_from_more_experts_than_there_are(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    """As published: numbers that pass the input on have no tensors."""
    source = tmp_path / "published"
    shutil.copytree(model_of("passing-experts"), source)
    tensors = load_file(source / "model.safetensors")
    lacking = {name: one for name, one in tensors.items() if ".experts.4." not in name and ".experts.5." not in name}
    assert len(lacking) < len(tensors)
    save_file(lacking, source / "model.safetensors", {"format": "pt"})
    left = planned(invoke, recipe(tmp_path, source))["left"]
    assert [row["name"] for row in left if row["reason"] == "router of experts"] == [
        "model.layers.N.mlp.router.classifier"
    ]


def test_layers_that_predict_further_tokens_stay_as_they_are(tmp_path: Path, invoke: Command) -> None:
    source = write(tmp_path / "llama", "llama", TEXT)
    tensors = load_file(source / "model.safetensors")
    extra = {
        name.replace("layers.0.", "layers.3."): value.clone() for name, value in tensors.items() if "layers.0." in name
    }
    extra["model.layers.3.eh_proj.weight"] = torch.randn(64, 128)
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    path = recipe(tmp_path, source)
    found = planned(invoke, path)
    assert found["share_quantized"] == 1
    assert [row["name"] for row in found["left"] if "eh_proj" in row["name"]] == ["model.layers.N.eh_proj"]
    assert invoke("build", path, "--dist", tmp_path / "dist").returncode == 0
    built = load_file(tmp_path / "dist" / "llama-GPTQ" / "main" / "model.safetensors")
    assert all(torch.equal(built[name], value) for name, value in extra.items())


@pytest.mark.parametrize(
    ("quantized", "words"),
    [
        ("{skip: ['*.layers.0.*', down_proj], min_share: 0.1}", None),
        ("{only: ['*.gate_proj', '*.up_proj']}", "only 28.6%"),
        ("{only: ['*.gate_proj', '*.up_proj'], min_share: 0.2}", None),
        ("{skip: [no_such_proj]}", "quantize.skip: 'no_such_proj' matches no linear"),
    ],
)
def test_a_recipe_chooses_linears_by_pattern(
    quantized: str, words: str | None, tmp_path: Path, invoke: Command
) -> None:
    source = write(tmp_path / "llama", "llama", {**TEXT, "num_hidden_layers": 2})
    path = recipe(tmp_path, source, f"quantize: {quantized}")
    done = invoke("plan", path, "--dist", tmp_path / "dist", "--json")
    if words:
        assert_refused(done, words)
        return
    assert done.returncode == 0, done.stderr
    assert invoke("build", path, "--dist", tmp_path / "dist").returncode == 0
    names = load_file(tmp_path / "dist" / "llama-GPTQ" / "main" / "model.safetensors")
    quantized_names = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    if "skip" in quantized:
        assert quantized_names
        assert not [name for name in quantized_names if ".0." in name or "down_proj" in name]
        assert "model.layers.1.mlp.down_proj.weight" in names
    else:
        assert {name.rpartition(".")[2] for name in quantized_names} == {"gate_proj", "up_proj"}


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("zamba", {
            **TEXT, "tie_word_embeddings": True,
            "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "num_key_value_heads": 4,
            "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_d_state": 8, "n_mamba_heads": 2,
        }, ["share weights"]),
        ("dbrx", {
            "vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        }, ["of the blocks' weights can be quantized", "quantize.min_share"]),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused_by_the_plan(
    kind: str, config: dict[str, Any], words: list[str], tmp_path: Path, invoke: Command
) -> None:
    source = write(tmp_path / kind, kind, config)
    assert_refused(invoke("plan", recipe(tmp_path, source), "--dist", tmp_path / "dist"), *words)


def test_what_the_model_changes_between_blocks_is_refused(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router's states that are doubled on their way to the next block, which no argument shows."""

    def called(self: Any, hidden: torch.Tensor, states: torch.Tensor | None, **keywords: Any) -> Any:
        return torch.nn.Module.__call__(self, hidden, None if states is None else states * 2, **keywords)

    source = resolve(Model(source=str(model_of("states-in-arguments"))), weights=True)
    monkeypatch.setattr(modeling_zaya.ZayaDecoderLayer, "__call__", called)
    with pytest.raises(SourceError, match="hand on more than hidden states"):
        StreamedModel(source, torch.float32, torch.device("cpu"))


def test_experts_that_no_loader_reads_are_refused_but_for_gguf(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    path = recipe(tmp_path, model_of("fused-experts"), "release: {owner: me}")
    done = invoke("plan", path, "--dist", tmp_path / "dist")
    assert_refused(done, "no loader is known to read its experts", "GPTQModel", "quantize.unread_experts")


def test_a_checkpoint_without_its_head_is_refused_by_the_plan(tmp_path: Path, invoke: Command) -> None:
    source = write(tmp_path / "llama", "llama", TEXT)
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = invoke("plan", recipe(tmp_path, source), "--dist", tmp_path / "dist")
    assert_refused(done, "the checkpoint lacks the tensor lm_head.weight")


def test_experts_in_mxfp4_are_those_of_their_dequantized_weights(
    model_of: Callable[[str], Path], tmp_path: Path, invoke: Command
) -> None:
    plain = model_of("interleaved-experts")
    tensors, dice = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(1)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=dice, dtype=torch.uint8)
        scales = torch.randint(118, 123, blocks.shape[:3], generator=dice, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        whole = [from_mxfp4(*one).t() for one in zip(blocks, scales, strict=True)]
        tensors[name] = torch.stack(whole).float()
    folders = [tmp_path / "plain", tmp_path / "packed"]
    for folder, content in zip(folders, (tensors, packed), strict=True):
        shutil.copytree(plain, folder)
        save_file({key: value.contiguous() for key, value in content.items()}, folder / "model.safetensors")
    config = json.loads((folders[1] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folders[1] / "config.json").write_text(json.dumps(config))

    built = []
    for folder in folders:
        path = recipe(tmp_path, folder)
        assert invoke("build", path, "--dist", tmp_path / "dist").returncode == 0
        built.append(load_file(tmp_path / "dist" / f"{folder.name}-GPTQ" / "main" / "model.safetensors"))
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(value, built[1][name]) for name, value in built[0].items())
    said = json.loads((tmp_path / "dist" / "packed-GPTQ" / "main" / "config.json").read_text())
    assert said["quantization_config"]["quant_method"] == "gptq"


def test_mxfp4_is_read_exactly() -> None:
    """Each of the 16 codes, low half of a byte first, with exponents below, at and above one."""
    blocks = torch.arange(16, dtype=torch.uint8).mul(16).add(torch.arange(15, -1, -1, dtype=torch.uint8))[None, None]
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    wanted = [number for high in range(16) for number in (values[15 - high], values[high])]
    for exponent in (120, 127, 130):
        found = from_mxfp4(blocks, torch.tensor([[exponent]], dtype=torch.uint8))
        assert found[0].tolist() == [number * 2.0 ** (exponent - 127) for number in wanted]
