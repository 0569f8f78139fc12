"""A stranger's config, manifest, tokenizer or GGUF file: one sentence that names the place, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from outcome import assert_refused

MANIFEST = "quantize-manifest.json"
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "num_experts_per_tok")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- config.json


@pytest.mark.parametrize(
    "value", ["abc", "4096", -1, 0, 10**30, 1e308, True, [128], {"a": 1}, 0.5, float("inf")], ids=str
)
def test_a_number_of_the_config_that_is_none_is_named(
    invoke: Command, tiny_recipe: Path, model: Path, tmp_path: Path, value: object
) -> None:
    for name in SIZES:
        shutil.copy(model / "config.json", tmp_path / "config.json")
        change(model / "config.json", **{name: value})
        result = invoke("plan", tiny_recipe, "--dist", tmp_path / "dist", "--set", f"model.source={model}")
        assert_refused(result, "config.json", f"{name}: must be an integer")
        shutil.copy(tmp_path / "config.json", model / "config.json")


def test_numbers_may_lie_deeper_or_be_null(invoke: Command, tiny_recipe: Path, model: Path, tmp_path: Path) -> None:
    def plan() -> Any:
        return invoke("plan", tiny_recipe, "--dist", tmp_path / "dist", "--set", f"model.source={model}")

    change(model / "config.json", max_position_embeddings=None)
    assert_refused(plan(), "transformers cannot build the architecture 'llama'", "max_position_embeddings")
    change(model / "config.json", max_position_embeddings=2048, hidden_size=128.0)
    assert_refused(plan(), "transformers cannot build the architecture 'llama'", "hidden_size")
    change(model / "config.json", hidden_size=128)
    assert plan().returncode == 0
    change(model / "config.json", text_config={"hidden_size": "x"})
    assert_refused(plan(), "text_config: hidden_size: must be")
    change(model / "config.json", text_config="x")
    assert_refused(plan(), "text_config: must be a mapping")


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "abc"},
        {"num_attention_heads": 0},
        {"hidden_act": [1]},
        {"rope_parameters": "x"},
        {"head_dim": -4},
    ],
    ids=lambda one: next(iter(one)),
)
def test_a_config_that_no_model_can_be_made_of_ends_a_build_in_a_sentence(
    invoke: Command, tiny_recipe: Path, model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    change(model / "config.json", **changes)
    result = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", "--set", f"model.source={model}")
    assert_refused(result, model)
    assert not list((tmp_path / "dist").glob("tiny*"))


# -- manifests


def without(data: dict[str, Any], *path: str) -> None:
    for key in path[:-1]:
        data = data[key]
    del data[path[-1]]


CHANGES: dict[str, Any] = {
    "source": "a name", "source.files": ["config.json"], "source.commit": 5, "repo": 7, "repo: no name": "a b/c",
    "branch": ["main"], "key_inputs.method": "gptq", "key_inputs.method.name": "int4", "key_inputs.parameters": [4],
    "key_inputs.parameters.bits": {"a": 1}, "key_inputs.calibration.corpora": [], "key_inputs.max_shard_size": "5GB",
    "key_inputs.calibration.corpora: odd": [{"hub": "x"}], "key_inputs.calibration.samples": None, "compute": "cpu",
    "compute.shards": "two", "compute.batch_tokens": [1], "versions": ["torch"], "calibration": "text", "engine": "x",
    "key_inputs.calibration.seed": 2**70,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_says_something_else_is_refused(
    invoke: Command, tiny_llama: Path, dist: Path, tmp_path: Path, name: str
) -> None:
    path = dist / "tiny-llama-GPTQ" / "main" / MANIFEST
    data = json.loads(path.read_text())
    *holders, last = name.partition(":")[0].split(".")
    here = data
    for key in holders:
        here = here[key]
    here[last] = CHANGES[name]
    path.write_text(json.dumps(data))
    result = invoke("rebuild", path, "--source", tiny_llama, "--into", tmp_path / "into", "--device", "cpu")
    assert_refused(result, path)
    assert not (tmp_path / "into").exists()


def test_parameters_cannot_name_another_branch(invoke: Command, tiny_llama: Path, dist: Path) -> None:
    path = dist / "tiny-llama-GPTQ" / "main" / MANIFEST
    data = json.loads(path.read_text())
    data["key_inputs"]["parameters"] |= {"branch": "other", "engine": "gptqmodel"}
    path.write_text(json.dumps(data))
    result = invoke("rebuild", path, "--source", tiny_llama, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "gptq/main" in result.stdout


def test_a_key_of_a_manifest_cannot_steer_the_terminal(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    path = dist / "tiny-llama-GPTQ" / "main" / MANIFEST
    data = json.loads(path.read_text())
    data["key"], data["key_inputs"]["\x1b[2J"] = "0" * 64, "x" * 10_000
    path.write_text(json.dumps(data))
    for command in ("plan", "explain", "status"):
        result = invoke(command, tiny_recipe, "--dist", dist)
        assert result.returncode == 0
        assert "\x1b" not in result.stdout
        assert max(map(len, result.stdout.splitlines())) < 500


# -- tokenizers


@pytest.mark.parametrize("limit", ["main", {"a": 1}, [], None], ids=str)
def test_a_tokenizer_that_cannot_encode(
    invoke: Command, tiny_recipe: Path, model: Path, tmp_path: Path, limit: object
) -> None:
    change(model / "tokenizer_config.json", model_max_length=limit)
    result = invoke(
        "build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "main", "--set", f"model.source={model}"
    )
    if limit is None:  # says nothing, and is fine
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode in {0, 2}
        assert "Traceback" not in result.stderr


def test_tokens_beyond_the_embeddings_are_named(
    invoke: Command, tiny_recipe: Path, model: Path, tmp_path: Path
) -> None:
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = {
        word: number + (10_000 if number > 300 else 0) for word, number in data["model"]["vocab"].items()
    }
    path.write_text(json.dumps(data))
    result = invoke(
        "build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "main", "--set", f"model.source={model}"
    )
    assert_refused(result, "its tokenizer gives the token", "384 rows")


# -- GGUF files


def test_a_gguf_file_that_lacks_tensors_is_no_source(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "embedding_length": 32,
        "context_length": 64,
        "feed_forward_length": 32,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a"])
    writer.add_token_types([3, 3, 1])
    writer.add_token_merges(["a a"])
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = invoke("plan", tiny_recipe, "--dist", tmp_path / "dist", "--set", f"model.source={path}")
    assert_refused(result, path, "it lacks the tensor")
