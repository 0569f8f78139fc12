"""``verify``: hashes, tensors against the source, and real consumers that say what the weights say."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

from quantize.files.child import Task, run_child
from quantize.verifying import loaders

NAME = "tiny-llama-GPTQ"
REPO = f"local/{NAME}"


@pytest.fixture
def branch(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete / NAME / "eight", tmp_path / "eight"))


def checks(invoke: Command, *arguments: Any) -> dict[str, tuple[str, str]]:
    """Outcome and detail by the first word of each check's name."""
    result = invoke("verify", *arguments, "--json")
    (verdict,) = json.loads(result.stdout)
    found = {check["name"].split()[0]: (check["outcome"], check["detail"]) for check in verdict["checks"]}
    outcomes = {outcome for outcome, _ in found.values()}
    assert result.returncode == (0 if "ok" in outcomes and "failed" not in outcomes else 3)
    assert ("every check was skipped" in result.stderr) == (outcomes == {"skipped"})
    return found


def change(folder: Path, part: str, values: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if key.endswith(part))
    if values is None:
        del tensors[name]
    else:
        tensors[name] = np.ascontiguousarray(values(tensors[name]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_finished_branch_is_what_it_says(invoke: Command, branch: Path, tiny_llama: Path) -> None:
    found = checks(invoke, branch, "--source", tiny_llama, "--no-load")
    assert found["hashes"][0] == found["tensors"][0] == "ok"
    assert found["tensors"][1].startswith("21 linears match the source, the largest relative error is ")


def test_without_a_source_or_manifest_nothing_is_claimed(invoke: Command, branch: Path) -> None:
    (branch / "quantize-manifest.json").unlink()
    found = checks(invoke, branch, "--no-load")
    assert found["hashes"][0] == found["tensors"][0] == "skipped"


def test_a_changed_byte_is_found(invoke: Command, branch: Path) -> None:
    data = bytearray((branch / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (branch / "model.safetensors").write_bytes(data)
    (branch / "tokenizer.json").unlink()
    outcome, detail = checks(invoke, branch, "--no-load")["hashes"]
    assert (outcome, detail) == ("failed", "model.safetensors has another SHA-256, tokenizer.json is missing")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (".scales", lambda scales: scales * np.float16(4), "is off by"),
        (".scales", lambda scales: np.full_like(scales, np.nan), "contains NaN or infinity"),
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.norm.weight", lambda norm: norm * np.float16(1.5), "model.norm.weight is off by"),
        ("embed_tokens.weight", lambda table: table[:-1], "has shape [383, 128], the source [384, 128]"),
    ],
)
def test_tensors_that_are_not_the_sources(
    part: str, values: Any, message: str, invoke: Command, branch: Path, tiny_llama: Path
) -> None:
    change(branch, part, values)
    outcome, detail = checks(invoke, branch, "--source", tiny_llama, "--no-load")["tensors"]
    assert (outcome, message in detail) == ("failed", True), detail


@pytest.fixture(scope="module")
def awq(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, invoke: Command) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"model: {{source: {tiny_llama}}}\ncalibration: {{dataset: pydoc, samples: 4, sequence_length: 64}}\n"
        "awq: {variants: [{group_size: 32}]}\n"
    )
    assert invoke("build", recipe, "--dist", folder / "dist", "--device", "cpu").returncode == 0
    return folder / "dist" / "tiny-llama-AWQ" / "main"


def test_scales_that_awq_folded_are_no_fault(invoke: Command, awq: Path, tiny_llama: Path) -> None:
    found = checks(invoke, awq, "--source", tiny_llama, "--no-load")
    assert found["tensors"][0] == "ok", found


@pytest.mark.loader
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("gptqmodel", "optimum")), reason="the extra `loaders` is not installed"
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_consumers_say_what_the_weights_say(
    method: str, invoke: Command, both: Path, awq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    answers: dict[str, Any] = {}

    def once(task: Task) -> Any:
        """The consumer's answer; it takes seconds to load the branch, and would answer the same again."""
        asked = json.dumps(task.arguments, sort_keys=True)
        if asked not in answers:
            answers[asked] = run_child(task)
        return answers[asked]

    monkeypatch.setattr(loaders, "run_child", once)
    folder = both / NAME / "eight"  # what loaded it is noted in a dist only
    if method == "awq":
        folder = Path(shutil.copytree(awq, both / "tiny-llama-AWQ" / "main"))
    found = checks(invoke, folder)
    assert found["transformers"][0] == "ok", found
    assert found["vllm"][0] == "skipped"
    loads = json.loads((folder / "quantize-manifest.json").read_text())["loads_in"]
    assert [(name.split()[0], outcome) for name, outcome in loads.items()] == [("transformers", "ok")]

    def other(folder: Path, ids: list[int]) -> torch.Tensor:
        return torch.nn.functional.one_hot((torch.tensor(ids) + 7) % 384, 384) * 20.0

    monkeypatch.setattr("quantize.verifying.forward.logits_of", other)
    outcome, detail = checks(invoke, folder)["transformers"]
    assert (outcome, "is not what the weights give" in detail) == ("failed", True)
    assert len(answers) == 1


def test_what_loaded_is_in_the_card(invoke: Command, both: Path, tiny_recipe: Path) -> None:
    manifest = both / NAME / "main" / "quantize-manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps({**data, "loads_in": {"transformers 5.23.0 + gptqmodel 7.6.0": "ok", "vllm": "failed"}})
    )
    assert invoke("card", tiny_recipe, "--dist", both).returncode == 0
    card = (both / NAME / "eight" / "README.md").read_text()
    assert "| Loads in |" in card
    assert "| transformers 5.23.0 + gptqmodel 7.6.0 |" in card
    assert not any("vllm" in line for line in card.splitlines() if line.startswith("| ["))


def test_a_consumer_that_cannot_load_it_is_a_failure(
    invoke: Command, branch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker_load.py").write_text("raise SystemExit('no kernel for this')")
    monkeypatch.setattr("quantize.verifying.loaders.__file__", str(tmp_path / "loaders.py"))
    monkeypatch.setattr("quantize.verifying.loaders.find_spec", lambda name: object() if name != "vllm" else None)
    found = checks(invoke, branch)
    assert found["transformers"] == ("failed", "cannot load it: no kernel for this")


def test_a_repo_on_the_hub_is_checked_by_its_listing(hub: HubServer, run: Command, both: Path) -> None:
    assert run("push", both).returncode == 0
    good = run("verify", None, REPO, "--json")
    assert good.returncode == 0
    assert [verdict["checks"][0]["outcome"] for verdict in json.loads(good.stdout)] == ["ok", "ok"]
    tree = hub.repos[REPO].tree("eight")
    weights = tree["model.safetensors"]
    hub.repos[REPO].commit("eight", {**tree, "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    bad = run("verify", None, f"{REPO}@eight", "--json")
    assert bad.returncode == 3
    assert json.loads(bad.stdout)[0]["checks"][0]["detail"] == "model.safetensors has another SHA-256"


def test_a_repo_on_the_hub_is_fetched_if_asked_for(
    hub: HubServer, run: Command, both: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert run("push", both).returncode == 0
    options = ["--download", "--no-load", "--source", str(tiny_llama), "--json"]
    found = run("verify", None, f"{REPO}@eight", *options)
    assert found.returncode == 0, found.stderr
    checks = json.loads(found.stdout)[0]["checks"]
    assert {check["name"]: check["outcome"] for check in checks} == {"hashes": "ok", "tensors": "ok"}
