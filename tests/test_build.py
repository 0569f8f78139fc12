"""A build's files: what is there, what is in them, and that nothing of the machine is."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ARCHITECTURES, write_model, write_recipe
from transformers import AutoModelForCausalLM, LlamaConfig

import quantize
from quantize.formats.gptq import decode
from quantize.formats.tensors import TensorSpec
from quantize.planning.modules import find_linears
from quantize.planning.sizes import variant_layout
from quantize.recipe.methods import GptqVariant
from quantize.source.checkpoint import Checkpoint
from quantize.source.examination import anatomy_of
from quantize.source.resolved import Source

VARIANTS = """\
  variants:
    - {bits: 4, group_size: 32}
    - {bits: 3, group_size: 64, desc_act: true, sym: false}
    - {bits: 8, group_size: -1, desc_act: static}
"""
BRANCHES = ["main", "gptq-3bit-64g-actorder_True-asym", "gptq-8bit--1g-actorder_static"]
ONE = "  variants: [{bits: 8, group_size: 32}]\n"


@dataclass
class Built:
    source: Path
    repo: Path
    result: Any

    @property
    def main(self) -> Path:
        return self.repo / "main"


def build(
    folder: Path, body: str = ONE, architecture: str = "llama", recipe: dict[str, Any] | None = None, **model: Any
) -> Built:
    source = write_model(folder / "tiny", architecture, **model)
    return build_from(source, folder, body, **(recipe or {}))


def build_from(source: Path, folder: Path, body: str, more: str = "", **calibration: Any) -> Built:
    calibration = {"compute_dtype": "float32", **calibration}
    path = write_recipe(folder / "recipe.yaml", source, body, **calibration)
    path.write_text(path.read_text() + more)
    result = quantize.build(quantize.load_recipe(path), quantize.BuildOptions(dist=folder / "dist", device="cpu"))
    return Built(source, folder / "dist" / "tiny-GPTQ", result)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def linear_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def decoded(tensors: dict[str, torch.Tensor], name: str, bits: int, form: str = "gptq") -> torch.Tensor:
    parts = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    return decode(parts, bits, form)


def assert_close(weight: torch.Tensor, source: torch.Tensor) -> None:
    """An 8-bit weight is its source within a percent."""
    assert float((weight - source.float()).norm() / source.float().norm()) < 0.01


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("build"), VARIANTS)


def test_every_branch_holds_exactly_its_files(built: Built) -> None:
    assert sorted(path.name for path in built.repo.iterdir()) == sorted(BRANCHES)
    source = {path.name for path in built.source.iterdir()}
    ours = {"quantize_config.json", "quantize-manifest.json"}
    for branch in BRANCHES:
        assert {path.name for path in (built.repo / branch).iterdir()} == source | ours


def test_nothing_unfinished_is_left(built: Built) -> None:
    left = [path.name for path in (built.repo.parent / ".quantize").rglob("*")]
    assert set(left) <= {"lock", "origins.json"}


def test_files_beside_the_weights_travel_byte_for_byte(built: Built) -> None:
    rewritten = {"model.safetensors", "config.json", "README.md"}
    carried = {name: data for name, data in files_of(built.source).items() if name not in rewritten}
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= set(carried)
    for branch in BRANCHES:
        found = files_of(built.repo / branch)
        assert {name: found[name] for name in carried} == carried


def test_tensor_bytes_are_what_the_plan_said(built: Built) -> None:
    for planned in built.result.plan.variants:
        path = built.repo / planned.branch / "model.safetensors"
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - 8 - header == planned.nbytes
        manifest = json.loads((built.repo / planned.branch / "quantize-manifest.json").read_text())
        assert manifest["tensor_bytes"] == planned.nbytes


def test_both_configs_say_the_same_and_keep_the_sources(built: Built) -> None:
    source = json.loads((built.source / "config.json").read_text())
    for branch, (bits, group_size, order) in zip(
        BRANCHES, [(4, 32, False), (3, 64, True), (8, -1, False)], strict=True
    ):
        config = json.loads((built.repo / branch / "config.json").read_text())
        own = json.loads((built.repo / branch / "quantize_config.json").read_text())
        assert config["quantization_config"] == own
        assert (own["bits"], own["group_size"], own["desc_act"]) == (bits, group_size, order)
        assert source.items() <= config.items()


def test_only_dynamic_act_order_moves_groups(built: Built) -> None:
    for branch, moved in zip(BRANCHES, [False, True, False], strict=True):
        tensors = load_file(built.repo / branch / "model.safetensors")
        for name in linear_names(tensors):
            g_idx = tensors[f"{name}.g_idx"]
            assert bool((g_idx.diff() < 0).any()) == moved, name


def test_everything_but_the_linears_is_the_sources(built: Built) -> None:
    source = load_file(built.source / "model.safetensors")
    for branch in BRANCHES:
        tensors = load_file(built.repo / branch / "model.safetensors")
        names = linear_names(tensors)
        assert len(names) == 3 * 7
        kept = {name for name in source if name.removesuffix(".weight") not in names}
        assert {name for name in tensors if name.rsplit(".", 1)[0] not in names} == kept
        assert all(torch.equal(tensors[name], source[name]) for name in kept)


def test_weights_are_the_sources_as_near_as_their_bits_allow(built: Built) -> None:
    source = load_file(built.source / "model.safetensors")
    for branch, bits in zip(BRANCHES, (4, 3, 8), strict=True):
        tensors = load_file(built.repo / branch / "model.safetensors")
        for name in linear_names(tensors):
            weight = source[f"{name}.weight"].float()
            distance = float((decoded(tensors, name, bits) - weight).norm() / weight.norm())
            assert distance < {3: 0.4, 4: 0.2, 8: 0.02}[bits], name


def test_the_manifest_lists_every_file_with_its_hash_and_every_module(built: Built) -> None:
    for branch in BRANCHES:
        folder = built.repo / branch
        manifest = json.loads((folder / "quantize-manifest.json").read_text())
        found = files_of(folder)
        assert set(manifest["files"]) == set(found) - {"quantize-manifest.json", "README.md"}
        for name, entry in manifest["files"].items():
            assert entry == {"bytes": len(found[name]), "sha256": hashlib.sha256(found[name]).hexdigest()}
        modules = [entry["module"] for entry in manifest["ledger"]]
        assert sorted(modules) == sorted(linear_names(load_file(folder / "model.safetensors")))
        assert {entry["outcome"] for entry in manifest["ledger"]} == {"solved"}
        assert {entry["tokens"] for entry in manifest["ledger"]} == {8 * 64}
        assert all(0 < entry["relative_error"] < 0.5 for entry in manifest["ledger"])
        weights = hashlib.sha256((built.source / "model.safetensors").read_bytes()).hexdigest()
        assert manifest["source"]["files"]["model.safetensors"] == weights


def test_the_ledgers_relative_error_is_that_of_the_weights(built: Built) -> None:
    ledgers = {}
    for branch in BRANCHES:
        ledger = json.loads((built.repo / branch / "quantize-manifest.json").read_text())["ledger"]
        ledgers[branch] = {entry["module"]: entry["relative_error"] for entry in ledger}
    for name in ledgers["main"]:
        three, four, eight = (ledgers[branch][name] for branch in (BRANCHES[1], "main", BRANCHES[2]))
        assert eight < four < three


def test_no_text_holds_a_path_of_this_machine_or_a_date(built: Built) -> None:
    places = {str(built.source.parent), str(Path.home()), tempfile.gettempdir(), str(Path.cwd())} - {"/"}
    for branch in BRANCHES:
        for name, data in files_of(built.repo / branch).items():
            if name.endswith((".json", ".md")) and name != "tokenizer.json":
                text = data.decode()
                assert not [place for place in places if place in text], name
                assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text), name


def test_two_builds_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    again = build_from(built.source, tmp_path, VARIANTS)
    assert files_of(again.repo) == files_of(built.repo)


def test_a_branch_is_the_same_alone_as_in_company(built: Built, tmp_path: Path) -> None:
    alone = build_from(built.source, tmp_path, "  variants: [{bits: 4, group_size: 32}]\n")
    found, expected = files_of(alone.main), files_of(built.main)
    for name in set(expected) - {"README.md"}:  # the card lists all branches
        assert found[name] == expected[name], name


def test_a_second_build_does_nothing(tmp_path: Path) -> None:
    first = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.repo.rglob("*")}
    second = build_from(first.source, tmp_path, ONE)
    assert (first.result.built, second.result.built, second.result.fresh) == (["gptq/main"], [], ["gptq/main"])
    assert {path: path.stat().st_mtime_ns for path in second.repo.rglob("*")} == before


def test_shards_and_their_index_are_read_by_transformers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "tiny", vocab_size=4096)
    built = build_from(source, tmp_path, ONE, "\nrelease: {max_shard_size: 1MB}\n")
    shards = sorted(path.name for path in built.main.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    index = json.loads((built.main / "model.safetensors.index.json").read_text())
    for name in shards:
        tensors = load_file(built.main / name)
        assert set(tensors) == {key for key, shard in index["weight_map"].items() if shard == name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 1_000_000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == built.result.plan.variants[0].nbytes
    assert transformers_finds_all(built, tmp_path)


def transformers_finds_all(built: Built, folder: Path) -> bool:
    """transformers' own reader takes the index: what is not quantized arrives, nothing is unreadable."""
    config = json.loads((built.main / "config.json").read_text())
    del config["quantization_config"]
    plain = folder / "plain"
    plain.mkdir()
    for path in built.main.glob("model*"):
        (plain / path.name).symlink_to(path)
    (plain / "config.json").write_text(json.dumps(config))
    model, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True, dtype=torch.float16)
    source = load_file(built.source / "model.safetensors")
    assert torch.equal(model.lm_head.weight, source["lm_head.weight"])
    packed = {name for name in report["unexpected_keys"] if name.endswith(".qweight")}
    return len(packed) == 3 * 7 and all("_proj" in name for name in report["missing_keys"])


def test_one_weight_file_has_the_metadata_that_transformers_wants(built: Built) -> None:
    with safe_open(built.main / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_built_with_all_its_linears(tmp_path: Path, architecture: str) -> None:
    built = build(tmp_path, architecture=architecture)
    source, tensors = load_file(built.source / "model.safetensors"), load_file(built.main / "model.safetensors")
    names = linear_names(tensors)
    stored = [name for name, tensor in source.items() if tensor.dim() == 2 and re.search(r"\.\d\.", name)]
    assert sorted(f"{name}.weight" for name in names) == sorted(stored)
    for name in names:
        weight = source[f"{name}.weight"]
        assert_close(decoded(tensors, name, 8), weight.t() if architecture == "gpt2" else weight)
        assert (f"{name}.bias" in tensors) == (f"{name}.bias" in source)
        if f"{name}.bias" in source:
            assert torch.equal(tensors[f"{name}.bias"], source[f"{name}.bias"])


def test_zero_biases_are_written_where_asked(tmp_path: Path) -> None:
    built = build(tmp_path, "  zero_bias: true\n" + ONE)
    tensors = load_file(built.main / "model.safetensors")
    for name in linear_names(tensors):
        bias = tensors[f"{name}.bias"]
        assert bias.dtype == torch.float16
        assert bias.shape == tensors[f"{name}.scales"].shape[1:]
        assert not bias.any()


def test_zero_bias_keeps_the_biases_that_are_there(tmp_path: Path) -> None:
    built = build(tmp_path, "  zero_bias: true\n" + ONE, "qwen2")
    source, tensors = load_file(built.source / "model.safetensors"), load_file(built.main / "model.safetensors")
    query, output = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.o_proj.bias"
    assert torch.equal(tensors[query], source[query])
    assert source[query].any()
    assert output not in source
    assert not tensors[output].any()


def test_checkpoint_format_v2_stores_zero_points_as_they_are(tmp_path: Path) -> None:
    v1 = load_file(build(tmp_path / "one").main / "model.safetensors")
    built = build(tmp_path / "two", "  checkpoint_format: gptq_v2\n" + ONE)
    v2 = load_file(built.main / "model.safetensors")
    config = json.loads((built.main / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == "gptq_v2"
    for name in linear_names(v2):
        assert torch.equal(decoded(v2, name, 8, "gptq_v2"), decoded(v1, name, 8))
        assert set(v2[f"{name}.qzeros"].view(torch.uint8).unique().tolist()) == {0x80}
        assert set(v1[f"{name}.qzeros"].view(torch.uint8).unique().tolist()) == {0x7F}


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    built = build(tmp_path, tie_word_embeddings=True)
    tensors = load_file(built.main / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unquantized_tensors_keep_the_sources_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    built = build(tmp_path, dtype=dtype)
    tensors = load_file(built.main / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == dtype
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


def test_a_list_of_texts_gives_each_its_share_of_the_samples(tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("a dog and a cat " * 300)
    texts[1].write_text("0123456789 " * 300)
    both = build(tmp_path / "both", recipe={"dataset": f"[{texts[0]}, {texts[1]}]"})
    one = build(tmp_path / "one", recipe={"dataset": f"[{texts[0]}]"})
    manifests = [json.loads((item.main / "quantize-manifest.json").read_text())["calibration"] for item in (both, one)]
    hashes = [hashlib.sha256(text.read_bytes()).hexdigest() for text in texts]
    assert [corpus["file_sha256"] for corpus in manifests[0]["corpora"]] == hashes
    assert manifests[0]["tokens"] == manifests[1]["tokens"] == 8 * 64
    assert manifests[0]["tokens_sha256"] != manifests[1]["tokens_sha256"]
    card = (both.main / "README.md").read_text()
    assert "a.txt, b.txt" in card
    assert str(tmp_path) not in card


# -- published sizes, from shapes alone

LLAMA_2 = {"7B": (32, 4096, 11008, 4096), "13B": (40, 5120, 13824, 5120), "70B": (80, 8192, 28672, 1024)}


def llama_2(size: str) -> Checkpoint:
    """The tensor table of a Llama-2 in float16: blocks, width, inner width, width of keys and values."""
    blocks, width, inner, keys = LLAMA_2[size]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, width), "model.norm.weight": (width,), "lm_head.weight": (32000, width),
    }  # fmt: skip
    for index in range(blocks):
        block = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes.update({f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()})
    tensors = {name: TensorSpec("F16", shape) for name, shape in shapes.items()}
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=width // 128, num_key_value_heads=keys // 128,
    )  # fmt: skip
    return Checkpoint(config.to_dict(), tensors)


@pytest.mark.parametrize(
    ("size", "bits", "group_size", "gigabytes"),
    [
        ("7B", 4, 128, "3.90"), ("7B", 4, 32, "4.28"),
        ("13B", 4, 128, "7.26"), ("13B", 4, 64, "7.51"), ("13B", 4, 32, "8.00"),
        ("13B", 8, 64, "13.95"), ("13B", 8, 128, "13.65"), ("13B", 8, -1, "13.36"),
        ("70B", 4, -1, "35.33"), ("70B", 4, 128, "36.65"), ("70B", 4, 32, "40.66"),
    ],
)  # fmt: skip
def test_published_sizes_follow_from_the_shapes(size: str, bits: int, group_size: int, gigabytes: str) -> None:
    checkpoint = llama_2(size)
    variant = GptqVariant(bits=bits, group_size=group_size, branch="main")
    table = find_linears(checkpoint, anatomy_of(Source(size, size, checkpoint, remote_hashes={})))
    layout = variant_layout(checkpoint, table, variant, 10**12, zero_bias=True)
    assert f"{layout.nbytes / 1e9:.2f}" == gigabytes
