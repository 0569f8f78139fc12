"""The command line: what each command prints and where, its exit codes, and how little it loads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import assert_refused, contents

Command = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = {"torch", "transformers", "datasets", "huggingface_hub", "numpy", "numba"}


def imported(result: subprocess.CompletedProcess[str]) -> set[str]:
    """The top-level packages that a run under PYTHONPROFILEIMPORTTIME imported."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE)}


def states(invoke: Command, recipe: Path, dist: Path, *options: str) -> dict[str, str]:
    plan = json.loads(invoke("plan", recipe, "--dist", dist, "--json", *options).stdout)
    return {item["branch"]: item["state"] for item in plan["variants"]}


# -- what it loads


def test_help_and_recipes_load_nothing_heavy(run_quantize: Command) -> None:
    for arguments in (["--help"], ["recipes"]):
        result = run_quantize(*arguments, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert result.returncode == 0
        assert "click" in imported(result)
        assert not imported(result) & HEAVY


def test_plan_of_a_local_model_loads_no_torch(run_quantize: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    result = run_quantize("plan", tiny_recipe, env={"PYTHONPROFILEIMPORTTIME": "1"}, cwd=tmp_path)
    assert result.returncode == 0
    assert "pydantic" in imported(result)
    assert not imported(result) & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize("command", ["recipes", "validate", "plan", "build", "explain", "status"])
def test_every_command_has_help(invoke: Command, command: str) -> None:
    result = invoke(command, "--help")
    assert result.returncode == 0
    assert f" {command} " in result.stdout.splitlines()[0]
    assert command in invoke("--help").stdout


@pytest.mark.parametrize("line", ["plna", "plan", "plan demo --jsno", "build demo --device tpu"])
def test_a_wrong_command_line_is_exit_code_2(invoke: Command, line: str) -> None:
    result = invoke(*line.split())
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: ")
    assert result.stdout == ""


# -- recipes and validate


def test_recipes_lists_every_shipped_recipe_with_its_headline(invoke: Command) -> None:
    lines = invoke("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "complete",
        "demo",
        "examples/airoboros-l2-13b-gpt4-m2.0",
        "gptq-8-branches",
        "gptq-and-awq",
    ]
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", ["demo", "gptq-8-branches", "examples/airoboros-l2-13b-gpt4-m2.0"])
def test_a_copied_recipe_loads_and_says_the_same(invoke: Command, tmp_path: Path, name: str) -> None:
    target = tmp_path / "mine.yaml"
    copied = invoke("recipes", "copy", name, target)
    assert copied.returncode == 0
    assert copied.stdout == ""
    ours, shipped = (json.loads(invoke("validate", recipe, "--json").stdout) for recipe in (target, name))
    assert ours == shipped


def test_copy_overwrites_only_when_told_to(invoke: Command, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    assert_refused(invoke("recipes", "copy", "demo", target), target, "exists already")
    assert target.read_text() == "precious"
    assert invoke("recipes", "copy", "demo", target, "--force").returncode == 0
    assert target.read_text() != "precious"


def test_copy_of_an_unknown_recipe_lists_the_known_ones(invoke: Command, tmp_path: Path) -> None:
    assert_refused(invoke("recipes", "copy", "dmeo", tmp_path / "x.yaml"), "dmeo", "gptq-8-branches")
    assert list(tmp_path.iterdir()) == []


def test_validate_lists_the_branches_and_needs_no_model(invoke: Command) -> None:
    result = invoke("validate", "gptq-8-branches", "--set", "model.source=no-such/model")
    assert result.returncode == 0
    assert result.stderr == ""
    assert [line.strip() for line in result.stdout.splitlines()[1:3]] == [
        "gptq/main",
        "gptq/gptq-4bit-64g-actorder_True",
    ]


def test_validate_refuses_a_bad_recipe(invoke: Command) -> None:
    recipe = Path(__file__).parent / "recipes" / "bad-typo-key.yaml"
    result = invoke("validate", recipe)
    assert_refused(result, f"{recipe.name}:7: gptq.variants[1].group_sise: ", "did you mean 'group_size'?")
    assert result.stdout == ""


# -- plan, status, explain


def test_plan_shows_each_branch_with_state_and_reason(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    result = invoke("plan", tiny_recipe, "--dist", dist)
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    assert result.returncode == 0
    assert rows["main"][-4:] == ["fresh", "up", "to", "date"]
    assert rows["eight"][-4:] == ["missing", "not", "built", "yet"]
    assert "to build: 1 of 2" in result.stdout


def test_plan_tells_machines_the_exact_size_of_what_is_built(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    from safetensors import safe_open

    plan = json.loads(invoke("plan", tiny_recipe, "--dist", dist, "--json").stdout)
    planned = {item["branch"]: item for item in plan["variants"]}
    with safe_open(dist / plan["repos"]["gptq"].split("/")[1] / "main" / "model.safetensors", framework="pt") as file:
        real = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert planned["main"]["tensor_bytes"] == real
    assert planned["eight"]["tensor_bytes"] > real
    assert plan["seconds"] > 0 < plan["peak_bytes"]
    assert plan["gpu_bytes"] > 0


def test_check_is_3_while_a_selected_branch_is_left(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    def code(*options: str) -> int:
        return invoke("plan", tiny_recipe, "--dist", dist, *options).returncode

    assert code() == 0
    assert code("--check") == 3
    assert code("--check", "--only", "eight") == 3
    assert code("--check", "--only", "main") == 0


def test_plan_writes_nothing(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    assert invoke("plan", tiny_recipe, "--dist", tmp_path / "dist").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_status_tells_what_is_built_and_what_does_not_belong(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    (dist / "tiny-llama-GPTQ" / "older").mkdir()
    text = invoke("status", tiny_recipe, "--dist", dist).stdout
    report = json.loads(invoke("status", tiny_recipe, "--dist", dist, "--json").stdout)
    main, eight = report["branches"]
    assert (main["state"], main["modules"], eight["state"], eight["modules"]) == ("fresh", 21, "missing", 0)
    assert 0 < main["mean_relative_error"] < 0.1
    assert report["not_in_recipe"] == ["tiny-llama-GPTQ/older"]
    assert "tiny-llama-GPTQ/older: not in this recipe" in text


def test_explain_names_the_input_that_changed(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    changes = ["--set", "gptq.variants.0.bits=8", "--set", "calibration.seed=5"]
    result = invoke("explain", tiny_recipe, "--dist", dist, "--only", "main", *changes)
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0] == "gptq/main: stale, changed: calibration.seed: 0 -> 5 and 1 more"
    assert lines[2:] == ["calibration.seed: 0 -> 5", "parameters.bits: 4 -> 8"]


def test_explain_of_a_fresh_branch_shows_one_key_twice(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    answers = json.loads(invoke("explain", tiny_recipe, "--dist", dist, "--json").stdout)
    assert [(item["branch"], item["state"], item["changed"]) for item in answers] == [
        ("gptq/main", "fresh", []),
        ("gptq/eight", "missing", []),
    ]
    assert answers[0]["key"] == answers[0]["built_key"] != answers[1]["key"]
    assert answers[1]["built_key"] is None


def test_a_changed_source_makes_a_branch_stale(
    invoke: Command, tiny_recipe: Path, tiny_llama: Path, dist: Path, tmp_path: Path
) -> None:
    model = tmp_path / "tiny-llama"
    shutil.copytree(tiny_llama, model)
    options = ["--only", "main", "--set", f"model.source={model}"]
    assert states(invoke, tiny_recipe, dist, *options)["main"] == "fresh"
    (model / "LICENSE").write_text("Another licence.\n")
    assert states(invoke, tiny_recipe, dist, *options)["main"] == "stale"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "quantize-manifest.json"])
def test_a_branch_that_lost_a_file_is_stale(invoke: Command, tiny_recipe: Path, dist: Path, name: str) -> None:
    (dist / "tiny-llama-GPTQ" / "main" / name).unlink()
    assert states(invoke, tiny_recipe, dist)["main"] == "stale"


# -- build


def test_only_builds_the_branches_that_match(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    before = contents(dist / "tiny-llama-GPTQ" / "main")
    result = invoke("build", tiny_recipe, "--dist", dist, "--only", "e*t", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["built"]
    assert states(invoke, tiny_recipe, dist) == {"main": "fresh", "eight": "fresh"}
    after = contents(dist / "tiny-llama-GPTQ" / "main")
    assert {name: after[name] for name in after if name != "README.md"} == {
        name: before[name] for name in before if name != "README.md"
    }


def test_only_that_matches_nothing_lists_the_branches(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    for command in ("plan", "build", "explain"):
        assert_refused(
            invoke(command, tiny_recipe, "--dist", dist, "--only", "9*"), "--only '9*'", "gptq/main, gptq/eight"
        )


def test_a_second_build_is_fresh_and_touches_nothing(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    def marks() -> dict[Path, tuple[int, int]]:
        paths = (dist / "tiny-llama-GPTQ").rglob("*")
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = marks()
    result = invoke("build", tiny_recipe, "--dist", dist, "--only", "main", "--device", "cpu")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["fresh"]
    assert marks() == before


def test_results_go_to_stdout_and_everything_else_to_stderr(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    result = invoke("build", tiny_recipe, "--dist", dist, "--only", "main", "--device", "cpu", "--json")
    report = json.loads(result.stdout)
    assert (report["repos"], report["built"], report["fresh"]) == ({"gptq": "local/tiny-llama-GPTQ"}, ["gptq/main"], [])
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert events[0]["event"] == "say"
    assert events[0]["message"].startswith("calibrating once on 128 tokens for 1 branch ")
    assert {"event": "progress", "title": "blocks", "done": 3, "total": 3, "unit": "block"} in events
    assert sorted(path.relative_to(dist).as_posix() for path in dist.glob("*/*")) == [
        ".quantize/lock",
        ".quantize/origins.json",
        "tiny-llama-GPTQ/main",
    ]


def test_the_same_recipe_builds_the_same_bytes(invoke: Command, tiny_recipe: Path, dist: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    built = invoke("build", tiny_recipe, "--dist", again, "--only", "main", "--device", "cpu")
    assert built.returncode == 0
    assert contents(again / "tiny-llama-GPTQ") == contents(dist / "tiny-llama-GPTQ")
