"""The CI matrix, and that the workflows' own command lines are ones that the command takes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command

WORKFLOWS = sorted((Path(__file__).parent.parent / ".github" / "workflows").glob("*.yml"))


def labels(matrix: dict[str, Any]) -> list[list[str]]:
    return [job["only"].split() for job in matrix["include"]]


def test_one_job_holds_all_that_shares_a_calibration(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("matrix", tiny_recipe, "--dist", tmp_path / "none").stdout)
    assert [sorted(job) for job in labels(found)] == [["gptq/eight", "gptq/main"]]


def test_more_jobs_share_the_branches_out(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("matrix", tiny_recipe, "--dist", tmp_path / "none", "--jobs", "9").stdout)
    assert sorted(labels(found)) == [["gptq/eight"], ["gptq/main"]]
    assert len({job["name"] for job in found["include"]}) == 2


def test_what_is_fresh_needs_no_job(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    assert labels(json.loads(invoke("matrix", tiny_recipe, "--dist", dist).stdout)) == [["gptq/eight"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_valid_and_their_commands_exist(workflow: Path, invoke: Command) -> None:
    data = yaml.safe_load(workflow.read_text())
    assert data["permissions"] == {"contents": "read"}
    steps = [step for job in data["jobs"].values() for step in job["steps"]]
    lines = [line for step in steps for line in str(step.get("run", "")).splitlines()]
    for line in lines:
        assert "${{" not in line, "an input goes through env, not into the shell"
    commands = [match for line in lines for match in re.findall(r"\.venv/bin/quantize ([^)\n]*)", line)]
    assert commands or workflow.stem in ("ci", "nightly")
    for command in commands:
        words = shlex.split(re.split(r"\$\(", command)[0])
        help_text = invoke(words[0], "--help").stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text


def test_the_build_jobs_command_line_builds_its_part(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    """As release.yml does: the matrix's patterns become --only options."""
    matrix = json.loads(invoke("matrix", tiny_recipe, "--dist", tmp_path / "dist", "--jobs", "2").stdout)
    for job in matrix["include"]:
        only = [word for label in job["only"].split() for word in ("--only", label)]
        built = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", *only, "--device", "cpu")
        assert built.returncode == 0, built.stderr
    assert json.loads(invoke("matrix", tiny_recipe, "--dist", tmp_path / "dist").stdout) == {"include": []}
