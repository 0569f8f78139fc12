"""A build that is killed at any moment goes on where it was, to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from outcome import contents
from tiny import EVERY_WAY, write_recipe

KILLER = Path(__file__).with_name("killing.py")
Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "recipe.yaml"
    return write_recipe(path, tiny_llama, EVERY_WAY, samples=2, compute_dtype="float32")


@pytest.fixture(scope="module")
def build(recipe: Path) -> Iterator[Build]:
    """``build(dist, moment)``: one build in a process of its own, killed at that moment."""
    command = [sys.executable, str(KILLER), str(recipe)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}  # a model this small has nothing to share out
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def run(dist: Path, moment: int | None = None) -> dict[str, Any]:
            print(json.dumps({"dist": str(dist), "moment": moment}), file=process.stdin, flush=True)
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An uninterrupted build, and its moments."""
    build(tmp_path_factory.mktemp("first") / "dist")  # hashes and kernels are remembered from now on
    dist = tmp_path_factory.mktemp("whole") / "dist"
    done = build(dist)
    assert (done["status"], done["error"]) == (0, None), done
    return dist, done["moments"]


def chosen(moments: list[str], count: int) -> list[int]:
    """Random moments, the last one of every kind, and the very last."""
    dice = random.Random(20)
    last = {kind: number for number, kind in enumerate(moments, 1)}
    found = {*last.values(), len(moments)}
    while len(found) < count:
        found.add(dice.randint(1, len(moments)))
    return sorted(found)


@pytest.mark.parametrize("which", range(20))
def test_a_build_killed_at_any_moment_ends_in_the_same_bytes(
    build: Build, whole: tuple[Path, list[str]], tmp_path: Path, which: int
) -> None:
    expected, moments = whole
    dist, moment = tmp_path / "dist", chosen(moments, 20)[which]
    killed = build(dist, moment)
    assert killed["status"] == -9, (moment, len(moments), killed)
    found = contents(dist)
    finished = {name: data for name, data in contents(expected).items() if not name.startswith(".quantize")}
    for branch in dist.glob("*/*/"):  # what is in its place is whole
        if branch.parent.name != ".quantize":
            inside = branch.relative_to(dist).as_posix() + "/"
            assert {name for name in finished if name.startswith(inside)} <= set(found)
    again = build(dist)
    assert (again["status"], again["error"]) == (0, None), again
    assert contents(dist) == contents(expected)
    shutil.rmtree(dist)


def test_a_second_kill_is_made_up_for_too(build: Build, whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    expected, moments = whole
    dist = tmp_path / "dist"
    assert build(dist, len(moments) // 2)["status"] == -9
    assert build(dist, len(moments) // 4)["status"] == -9
    again = build(dist)
    assert again["error"] is None
    assert "going on after block" in again["said"]
    assert contents(dist) == contents(expected)
