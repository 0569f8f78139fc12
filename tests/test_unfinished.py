"""What an unfinished build leaves, what shows it, what frees it, and what is kept for later variants."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import Command
from outcome import assert_refused, contents
from tiny import write_recipe

from quantize.building.calibration_pass import CalibrationPass
from quantize.calibration import parts
from quantize.executors import api as workers

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
awq:
  variants:
    - {branch: main, bits: 4, group_size: 32}
"""
NINTH = VARIANTS.replace("awq:", "    - {branch: ninth, bits: 8, group_size: 64, desc_act: true}\nawq:")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_llama, VARIANTS, samples=4, compute_dtype="float32")


@pytest.fixture
def half(invoke: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dist whose build met a full disk in its third block."""
    real = CalibrationPass._keep

    def full(self: CalibrationPass, next_block: int, *rest: object) -> None:
        if next_block == 3:
            raise OSError(28, "No space left on device")
        real(self, next_block, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(CalibrationPass, "_keep", full)
        assert_refused(
            invoke("build", recipe, "--dist", tmp_path / "half", "--device", "cpu"), "no space left", "kept", code=1
        )
    return tmp_path / "half"


def test_a_full_disk_costs_one_block(invoke: Command, recipe: Path, half: Path, tmp_path: Path) -> None:
    shown = invoke("status", recipe, "--dist", half)
    assert "unfinished: gptq/main, awq/main: 2 of 3 blocks" in shown.stdout
    done = invoke("build", recipe, "--dist", half, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "going on after block 2 of 3" in done.stderr
    assert invoke("build", recipe, "--dist", tmp_path / "whole", "--device", "cpu").returncode == 0
    assert contents(half) == contents(tmp_path / "whole")
    assert "unfinished" not in invoke("status", recipe, "--dist", half).stdout


def test_another_recipe_begins_anew_and_leaves_the_unfinished_one(invoke: Command, recipe: Path, half: Path) -> None:
    other = invoke("build", recipe, "--dist", half, "--device", "cpu", "--set", "calibration.seed=1")
    assert "going on" not in other.stderr
    assert len(json.loads(invoke("status", recipe, "--dist", half, "--json").stdout)["unfinished"]) == 1
    done = invoke("build", recipe, "--dist", half, "--device", "cpu")
    assert "going on after block 2 of 3" in done.stderr


@pytest.mark.parametrize("damage", ["state", "states", "shard"])
def test_a_damaged_unfinished_build_is_never_taken_for_a_whole_one(
    invoke: Command, recipe: Path, half: Path, tmp_path: Path, damage: str
) -> None:
    (folder,) = (half / ".quantize" / "unfinished").iterdir()
    if damage == "state":
        (folder / "blocks.jsonl").write_text("{")
    elif damage == "states":
        for path in folder.glob("states-*"):
            os.truncate(path, 10)
    else:
        next(folder.rglob("*.safetensors")).unlink()
    again = invoke("build", recipe, "--dist", half, "--device", "cpu")
    if damage == "state":
        assert again.returncode == 0, again.stderr
    else:
        assert_refused(again, "quantize clean", code=1)
        assert invoke("clean", "--dist", half, "--yes").returncode == 0
        assert invoke("build", recipe, "--dist", half, "--device", "cpu").returncode == 0
    assert invoke("build", recipe, "--dist", tmp_path / "whole", "--device", "cpu").returncode == 0
    assert contents(half) == contents(tmp_path / "whole")


def test_clean_frees_what_is_unfinished_and_nothing_else(invoke: Command, recipe: Path, half: Path, dist: Path) -> None:
    shutil.copytree(half / ".quantize", dist / ".quantize", dirs_exist_ok=True)
    before = {name: data for name, data in contents(dist).items() if not name.startswith(".quantize")}
    shown = invoke("clean", "--dist", dist, "--dry-run")
    assert "2 of 3" in shown.stdout
    assert (dist / ".quantize" / "unfinished").is_dir()
    assert invoke("clean", "--dist", dist, "--yes").returncode == 0
    assert not (dist / ".quantize" / "unfinished").exists()
    assert {name: data for name, data in contents(dist).items() if not name.startswith(".quantize")} == before
    assert "nothing unfinished" in invoke("clean", "--dist", dist).stderr


def test_spilled_states_and_a_small_budget_give_the_same_bytes(invoke: Command, recipe: Path, tmp_path: Path) -> None:
    plain, tight = tmp_path / "plain", tmp_path / "tight"
    drifting = ("--set", "gptq.propagate=quantized")
    assert invoke("build", recipe, "--dist", plain, "--device", "cpu", *drifting).returncode == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers, "StateFiles", lambda folder, name, spilled: REAL_STATE_FILES(folder, name, True))
        assert invoke("build", recipe, "--dist", tight, "--device", "cpu", *drifting).returncode == 0
    assert contents(plain) == contents(tight)


REAL_STATE_FILES = workers.StateFiles


def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(invoke: Command, recipe: Path, tmp_path: Path) -> None:
    for command in ("plan", "build"):
        refused = invoke(command, recipe, "--dist", tmp_path / "dist", "--memory", "200MB")
        assert_refused(refused, "--memory 0.20 GB", "needs at least", "--only")
    assert_refused(
        invoke("plan", recipe, "--dist", tmp_path / "dist", "--memory", "0.7"),
        "--memory 0.7: must be greater than or equal to 1000000",
    )
    refused = invoke("plan", recipe, "--dist", tmp_path / "dist", "--memory", "much")
    assert_refused(refused, "--memory much: must be a size such as 5GB")
    assert not list((tmp_path / "dist").glob("*/*/*.safetensors"))


def test_kept_statistics_serve_a_ninth_branch_without_a_forward_pass(
    invoke: Command, recipe: Path, tiny_llama: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist = tmp_path / "dist"
    assert invoke("build", recipe, "--dist", dist, "--device", "cpu", "--keep-statistics").returncode == 0
    more = write_recipe(tmp_path / "more.yaml", tiny_llama, NINTH, samples=4, compute_dtype="float32")
    assert invoke("build", more, "--dist", tmp_path / "fresh", "--device", "cpu").returncode == 0
    with monkeypatch.context() as patched:
        patched.setattr(parts, "block_statistics", None)  # there is no forward pass to be had
        done = invoke("build", more, "--dist", dist, "--device", "cpu", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["built"] == ["gptq/ninth"]
        alone = invoke("build", more, "--dist", tmp_path / "alone", "--device", "cpu")
        assert alone.returncode == 0, alone.stderr
    assert contents(tmp_path / "alone") == contents(tmp_path / "fresh")
    assert json.loads(invoke("status", more, "--dist", dist, "--json").stdout)["cache_bytes"]["statistics"] > 0

    block = next(cache.rglob("statistics/*/00001.safetensors"))
    os.truncate(block, block.stat().st_size // 2)
    refused = invoke("build", more, "--dist", tmp_path / "damaged", "--device", "cpu")
    assert_refused(refused, "00001.safetensors", "quantize gc --part statistics")


def test_gc_frees_what_was_not_used_for_long(invoke: Command, recipe: Path, tmp_path: Path, cache: Path) -> None:
    assert invoke("build", recipe, "--dist", tmp_path / "d", "--device", "cpu", "--keep-statistics").returncode == 0
    (kept,) = (cache / "statistics").iterdir()
    assert "nothing is older" in invoke("gc", "--part", "statistics").stderr
    long_ago = time.time() - 40 * 86400
    for path in [*kept.iterdir(), kept]:
        os.utime(path, (long_ago, long_ago))
    assert invoke("gc", "--dry-run").returncode == 0
    assert kept.is_dir()
    freed = invoke("gc", "--yes")
    assert freed.returncode == 0, freed.stderr
    assert "freed" in freed.stderr
    assert not kept.exists()
    assert (cache / "hashes").is_dir()
    assert_refused(invoke("gc", "--part", "compute-dtype"), "is not a part of the cache")
