"""``lint``: every fault a careful publisher looks for, each planted in a finished branch and found again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

NAME = "tiny-llama-GPTQ"
REPO = f"local/{NAME}"
FRONT = "---\nbase_model: org/tiny\nbase_model_relation: quantized\nlicense: mit\npipeline_tag: text-generation\n---\n"
Found = list[dict[str, str]]


@pytest.fixture
def branch(complete: Path, tmp_path: Path) -> Path:
    """The branch ``eight``, whose card lacks nothing, outside of any dist."""
    folder = Path(shutil.copytree(complete / NAME / "eight", tmp_path / "tiny"))
    (folder / "README.md").write_text(FRONT + "# tiny\n")
    return folder


def findings(invoke: Command, *arguments: Any) -> Found:
    result = invoke("lint", *arguments, "--json")
    assert result.returncode in {0, 3}, result.stderr
    return [finding for report in json.loads(result.stdout) for finding in report["findings"]]


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for key, value in changes.items():
            part = data
            *parents, last = key.split("__")
            for parent in parents:
                part = part[parent]
            if value is None:
                del part[last]
            else:
                part[last] = value
        (folder / name).write_text(json.dumps(data))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(file.seek(0, 2) - 64)


def scramble(tensors: dict[str, np.ndarray]) -> None:
    name = next(key for key in tensors if key.endswith("g_idx"))
    tensors[name] = np.ascontiguousarray((np.arange(tensors[name].size) // 32)[::-1].astype(np.int32))


def grouped(folder: Path) -> None:
    """As if groups of 32 had been quantized with act-order, and the configs denied it."""
    for name, prefix in (("config.json", "quantization_config__"), ("quantize_config.json", "")):
        edit_json(name, **{f"{prefix}desc_act": False, f"{prefix}group_size": 32})(folder)
    edit_tensors(scramble)(folder)


def poison(tensors: dict[str, np.ndarray]) -> None:
    name = next(key for key in tensors if key.endswith("scales"))
    tensors[name] = np.full_like(tensors[name], np.nan)


def lose(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [key for key in tensors if key.endswith(part)]:
            del tensors[name]

    return change


def shard(folder: Path) -> None:
    table = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    lost = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table | lost}))


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (remove("config.json"), "error", "config-missing"),
    "broken config": (write("config.json", "{"), "error", "config-broken"),
    "not said to be quantized": (edit_json("config.json", quantization_config=None), "error", "config-unquantized"),
    "bits disagree": (edit_json("quantize_config.json", bits=4), "error", "configs-disagree"),
    "own config missing": (remove("quantize_config.json"), "warning", "own-config-missing"),
    "own config broken": (write("quantize_config.json", "[]"), "error", "own-config-broken"),
    "base name": (edit_json("quantize_config.json", model_file_base_name="gptq_model-4bit"), "warning", "base-name"),
    "path of a machine": (edit_json("config.json", _name_or_path="/home/me/model"), "warning", "machine-path"),
    "dtypes": (edit_json("config.json", dtype="bfloat16"), "warning", "dtypes-disagree"),
    "theta": (
        edit_json("config.json", rope_theta=5e5, rope_parameters={"rope_theta": 1e6}), "error", "rope-theta",
    ),
    "theta missing": (
        edit_json("config.json", rope_theta=None, rope_parameters={"rope_theta": 1e6}), "warning", "rope-theta",
    ),
    "code missing": (edit_json("config.json", auto_map={"AutoModel": "modeling_x.X"}), "error", "code-missing"),
    "marlin with act-order": (
        edit_json("config.json", quantization_config__is_marlin_format=True), "error", "marlin-act-order",
    ),
    "group size of a few kernels": (
        edit_json("config.json", quantization_config__group_size=16), "note", "group-size",
    ),
    "weights cut short": (cut, "error", "shard-damaged"),
    "no weights": (remove("model.safetensors"), "error", "no-weights"),
    "a pickle": (write("pytorch_model.bin", "x"), "warning", "pickle"),
    "a second weight file": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "old.safetensors") and None,
        "error", "index-missing",
    ),
    "a shard missing": (shard, "error", "shard-missing"),
    "scales of nothing": (edit_tensors(poison), "error", "not-finite"),
    "zeros missing": (edit_tensors(lose("qzeros")), "error", "part-missing"),
    "nothing quantized": (edit_tensors(lose("qweight")), "error", "nothing-quantized"),
    "shapes of other bits": (edit_json("config.json", quantization_config__bits=4), "error", "shape"),
    "act-order denied": (grouped, "error", "act-order-hidden"),
    "no tokenizer": (remove("tokenizer.json"), "error", "tokenizer-missing"),
    "no tokenizer config": (remove("tokenizer_config.json"), "warning", "tokenizer-config"),
    "vocabulary too large": (edit_json("config.json", vocab_size=100), "warning", "vocabulary"),
    "no card": (remove("README.md"), "error", "card-missing"),
    "no front matter": (write("README.md", "# hello"), "error", "card-metadata"),
    "broken front matter": (write("README.md", "---\n{[\n---\n"), "error", "card-metadata"),
    "no base model": (write("README.md", "---\nlicense: mit\n---\n"), "error", "base-model"),
    "no licence": (write("README.md", "---\nbase_model: a/b\n---\n"), "error", "licence"),
    "other licence without a name": (write("README.md", FRONT.replace("mit", "other")), "warning", "licence"),
    "library": (write("README.md", FRONT.replace("license", "library_name: gguf\nlicense")), "warning", "library"),
    "a size that is off": (write("README.md", FRONT + "| [main](x) | 4 | 7.26 GB |\n"), "warning", "size"),
    "a dead link": (write("README.md", FRONT + "[terms](LICENSE.txt)\n"), "warning", "link"),
    "a file smaller than its manifest says": (write("tokenizer_config.json", "{}"), "error", "manifest"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, invoke: Command, branch: Path) -> None:
    plant, severity, check = FAULTS[name]
    before = {finding["check"] for finding in findings(invoke, branch)}
    assert check not in before
    plant(branch)
    found = findings(invoke, branch)
    assert (severity, check) in {(finding["severity"], finding["check"]) for finding in found}


def test_our_own_branches_have_no_fault(invoke: Command, complete: Path, tmp_path: Path) -> None:
    dist = Path(shutil.copytree(complete / NAME, tmp_path / NAME))
    for folder in dist.iterdir():
        (folder / "README.md").write_text(FRONT + "# tiny\n")
    result = invoke("lint", dist)
    assert result.returncode == 0, result.stdout
    assert f"{NAME} eight (gptq)" in result.stdout
    assert "2 branches: 0 errors, 0 warnings, 0 notes" in result.stdout


def test_errors_are_exit_code_3_and_warnings_only_if_strict(invoke: Command, branch: Path) -> None:
    assert invoke("lint", branch).returncode == 0
    (branch / "tokenizer_config.json").unlink()
    (branch / "quantize-manifest.json").unlink()
    assert invoke("lint", branch).returncode == 0
    assert invoke("lint", branch, "--strict").returncode == 3
    (branch / "tokenizer.json").unlink()
    assert invoke("lint", branch).returncode == 3


def test_what_the_source_has_must_come_along(invoke: Command, branch: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")
    (source / "USE_POLICY.md").write_text("be good")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text("{}")
    (branch / "generation_config.json").unlink(missing_ok=True)
    (branch / "chat_template.jinja").unlink(missing_ok=True)
    checks = {finding["check"] for finding in findings(invoke, branch, "--source", source)}
    assert {"licence-not-inherited", "licence-file", "chat-template", "not-carried-over"} <= checks


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no/such/folder", "no such directory"),
        ("../there-is-no-such-folder", "no such directory"),
        ("{empty}", "contains neither a model"),
    ],
)
def test_a_target_that_is_none(target: str, message: str, invoke: Command, tmp_path: Path) -> None:
    result = invoke("lint", target.format(empty=tmp_path))
    assert result.returncode == 2
    assert message in result.stderr


# -- on the hub


def lint_hub(run: Command, *arguments: str) -> dict[str, set[str]]:
    result = run("lint", None, *arguments, "--json")
    assert result.returncode in {0, 3}, result.stderr
    return {report["branch"]: {f["check"] for f in report["findings"]} for report in json.loads(result.stdout)}


def test_a_repo_on_the_hub_is_checked_by_headers_alone(hub: HubServer, run: Command, both: Path) -> None:
    assert run("push", both).returncode == 0
    repo = hub.repos[REPO]
    card = FRONT.replace("org/tiny", "org/source").encode()
    repo.commit("eight", {**repo.tree("eight"), "README.md": card, "padding.gguf": b"x" * 10_000_000})
    hub.repos["org/source"] = type(repo)()
    hub.repos["org/source"].commit("main", {"README.md": b"---\nlicense: llama2\n---\n", "LICENSE.txt": b"terms"})
    hub.downloaded = 0
    found = lint_hub(run, REPO)
    assert found == {"main": {"base-model"}, "eight": {"licence-not-inherited", "licence-file"}}
    weights = sum(len(repo.tree(name)["model.safetensors"]) for name in ("main", "eight"))
    assert hub.downloaded < weights
    assert set(lint_hub(run, f"{REPO}@eight")) == {"eight"}


def test_a_repo_or_branch_that_the_hub_lacks(hub: HubServer, run: Command, both: Path) -> None:
    assert "no such repo on the hub" in run("lint", None, REPO).stderr
    assert run("push", both).returncode == 0
    assert "has no branch nine; its branches are eight, main" in run("lint", None, f"{REPO}@nine").stderr


def test_a_card_cannot_name_a_folder_of_this_machine(
    hub: HubServer, run: Command, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "source").mkdir(parents=True)
    (tmp_path / "org" / "source" / "README.md").write_text("---\nlicense: secret\n---\n")
    monkeypatch.chdir(tmp_path)
    assert run("push", both).returncode == 0
    tree = hub.repos[REPO].tree("eight")
    hub.repos[REPO].commit("eight", {**tree, "README.md": FRONT.replace("org/tiny", "org/source").encode()})
    assert "source" in lint_hub(run, f"{REPO}@eight")["eight"]  # it could not be compared
