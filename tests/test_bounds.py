"""A variant that measures garbage is an error: bounds, and what each command says and refuses."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from hub_server import HubServer
from outcome import assert_refused
from safetensors.torch import load_file, save_file

import quantize
from quantize.errors import QualityError
from quantize.publishing.bounds import Figure, default_bound, judge
from quantize.recipe.levels import LEVELS, bits_of

TEXT = ["--set", "measure.samples=2", "--set", "measure.sequence_length=48", "--device", "cpu"]
STRICT = [*TEXT, "--set", "measure.max_kl=0.05"]
LABEL = "gptq/eight"


# -- the bounds


def reasons(*figures: Figure, **bounds: Any) -> dict[str, str]:
    return {label: found.reason for label, found in judge(figures, **bounds).items() if found.reason}


def test_bits_of_every_level() -> None:
    assert {bits_of(level) for level in LEVELS} == {1, 2, 3, 4, 5, 6, 8, 16, 32}
    assert [bits_of(level) for level in ("Q4_K_M", "IQ2_XXS", "BF16", "TQ1_0", "MXFP4", "Q8_0")] == [4, 2, 16, 1, 4, 8]


@pytest.mark.parametrize(
    ("bits", "bound"), [(1, 5), (2, 5), (3, 2.5), (4, 1), (5, 0.5), (7, 0.5), (8, 0.25), (32, 0.25)]
)
def test_the_default_bound_is_by_bits_and_is_itself_allowed(bits: int, bound: float) -> None:
    assert default_bound(bits) == bound
    assert not reasons(Figure("a", bits, bound))
    assert f"is {bound:g} nats at {bits} bits" in reasons(Figure("a", bits, math.nextafter(bound, 9)))["a"]


def test_the_recipe_sets_the_bound_or_none() -> None:
    assert not reasons(Figure("a", 4, 6.1), max_kl=7.0)
    assert not reasons(Figure("a", 4, 6.1), max_kl=None)
    assert "is 0.01 nats in the recipe" in reasons(Figure("a", 4, 0.02), max_kl=0.01)["a"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_out_of_any_bounds(value: float) -> None:
    assert "NaN" in reasons(Figure("a", 2, value), max_kl=None, max_kl_ratio=None)["a"]


def test_out_of_proportion_to_those_with_no_more_bits() -> None:
    good, bad = Figure("good", 4, 0.06), Figure("bad", 4, 0.61)
    assert "10 times" in reasons(good, bad)["bad"]
    assert "good (0.06), which has the same bits" in reasons(good, bad)["bad"]
    assert "fewer bits" in reasons(Figure("good", 3, 0.06), bad)["bad"]
    assert list(reasons(good, bad, Figure("bad too", 4, 0.9))) == ["bad", "bad too"]  # they do not excuse each other
    assert not reasons(good, bad, max_kl_ratio=None)
    assert not reasons(good, Figure("b", 4, 0.6))  # just ten times
    assert not reasons(Figure("good", 4, 0.001), Figure("b", 4, 0.5))  # below the floor, however large the ratio
    assert not reasons(Figure("good", 8, 0.001), Figure("b", 3, 2.0))  # more bits say nothing about fewer
    assert not reasons(Figure("good", 4, 0.06, "one text"), Figure("b", 4, 0.61, "another"))
    assert not reasons(Figure("good", 4, 0.06), Figure("worse", 4, 0.4), bad)  # the worst is what counts
    assert not reasons(bad)


# -- the commands


@pytest.fixture
def damaged(both: Path) -> Path:
    """A dist in which the branch ``eight`` holds scales three times too large, as a fault in writing would leave it."""
    damage(both, lambda scales: scales * 3)
    return both


def damage(dist: Path, change: Any) -> None:
    folder = dist / "tiny-llama-GPTQ" / "eight"
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(value) if name.endswith(".scales") else value for name, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    path = folder / "quantize-manifest.json"
    manifest = json.loads(path.read_text())
    data = (folder / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def manifest_of(dist: Path, branch: str = "eight") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dist / "tiny-llama-GPTQ" / branch / "quantize-manifest.json").read_text())
    return found


def test_build_and_measure_say_it_every_time(invoke: Command, tiny_recipe: Path, damaged: Path) -> None:
    for command in (["build", "--measure"], ["build", "--measure"], ["build"], ["measure"]):
        result = invoke(command[0], tiny_recipe, "--dist", damaged, *STRICT, *command[1:])
        assert_refused(result, f"{LABEL} (KL divergence", "measure.max_kl is 0.05", "--force", code=1)
        assert "gptq/main (" not in result.stderr
        assert "main" in result.stdout  # everything else is shown
    quality = manifest_of(damaged)["quality"]
    assert quality["verdict"]["within_bounds"] is False
    assert quality["verdict"]["bound"] == 0.05
    assert manifest_of(damaged, "main")["quality"]["verdict"] == {"within_bounds": True, "bound": 0.05, "reason": None}
    recipe = quantize.load_recipe(tiny_recipe, ["measure.max_kl=0.05", *STRICT[1:4:2]])
    for call in (quantize.api.build, quantize.api.measure):
        options = {quantize.api.build: quantize.BuildOptions, quantize.api.measure: quantize.api.MeasureOptions}[call]
        with pytest.raises(QualityError, match="eight"):
            call(recipe, options(dist=damaged, device="cpu"))  # type: ignore[arg-type]


def test_status_report_and_card_say_it(invoke: Command, tiny_recipe: Path, damaged: Path) -> None:
    assert invoke("measure", tiny_recipe, "--dist", damaged, *STRICT).returncode == 1
    bound = ["--set", "measure.max_kl=0.05"]
    status = invoke("status", tiny_recipe, "--dist", damaged, *bound)
    assert status.returncode == 0
    assert f"{LABEL}: unfit for use: KL divergence" in status.stdout
    rows = json.loads(invoke("status", tiny_recipe, "--dist", damaged, *bound, "--json").stdout)["branches"]
    assert [bool(row["out_of_bounds"]) for row in rows] == [False, True]
    for branch in ("main", "eight"):
        card = (damaged / "tiny-llama-GPTQ" / branch / "README.md").read_text()
        assert f"**`{LABEL}` is not fit for use: KL divergence" in card
        assert "**GPTQ main** is the best trade" in card
    assert invoke("report", tiny_recipe, "--dist", damaged, *bound).returncode == 0
    assert f"{LABEL} is not fit for use" in (damaged / "report.html").read_text()


def test_another_bound_clears_it_without_measuring_again(invoke: Command, tiny_recipe: Path, damaged: Path) -> None:
    assert invoke("measure", tiny_recipe, "--dist", damaged, *STRICT).returncode == 1
    loose = invoke("build", tiny_recipe, "--dist", damaged, *TEXT, "--set", "measure.max_kl=null", "--measure")
    assert loose.returncode == 0, loose.stderr
    assert "measuring" not in loose.stderr
    assert manifest_of(damaged)["quality"]["verdict"]["within_bounds"] is True
    assert "not fit" not in (damaged / "tiny-llama-GPTQ" / "main" / "README.md").read_text()


def test_a_branch_built_anew_clears_it(invoke: Command, tiny_recipe: Path, damaged: Path) -> None:
    assert invoke("measure", tiny_recipe, "--dist", damaged, *STRICT).returncode == 1
    shutil.rmtree(damaged / "tiny-llama-GPTQ" / "eight")
    repaired = invoke("build", tiny_recipe, "--dist", damaged, *STRICT, "--measure")
    assert repaired.returncode == 0, repaired.stderr
    assert manifest_of(damaged)["quality"]["verdict"]["within_bounds"] is True


def test_nan_is_recorded_and_the_others_are_measured(invoke: Command, tiny_recipe: Path, both: Path) -> None:
    damage(both, lambda scales: torch.full_like(scales, math.nan))
    bounds = ["--set", "measure.max_kl=null", "--set", "measure.max_kl_ratio=null"]
    result = invoke("measure", tiny_recipe, "--dist", both, *TEXT, *bounds, "--json")
    assert_refused(result, f"{LABEL} (its outputs are NaN", code=1)
    rows = {row["branch"]: row for row in json.loads(result.stdout)["branches"]}
    assert rows["gptq/main"]["kl_divergence"] > 0
    assert rows[LABEL]["kl_divergence"] is None
    assert manifest_of(both)["quality"]["verdict"]["within_bounds"] is False
    assert "| nan |" in (both / "tiny-llama-GPTQ" / "eight" / "README.md").read_text()
    assert "nan" in invoke("measure", tiny_recipe, "--dist", both, *TEXT).stdout


def test_push_and_git_refuse_it_unless_forced(
    hub: HubServer, run: Command, invoke: Command, tiny_recipe: Path, damaged: Path, tmp_path: Path
) -> None:
    assert invoke("measure", tiny_recipe, "--dist", damaged, *STRICT).returncode == 1
    bound = ["--set", "measure.max_kl=0.05"]
    assert_refused(run("push", damaged, *bound), LABEL, "KL divergence", "--force", "--only")
    assert hub.repos == {}  # nothing was created
    shown = run("push", damaged, *bound, "--dry-run")
    assert shown.returncode == 0
    assert [line for line in shown.stdout.splitlines() if line.startswith("refuse") and LABEL in line]
    assert run("push", damaged, *bound, "--only", "main").returncode == 0
    assert run("push", damaged, *bound, "--check").returncode == 3
    git = ["git", tiny_recipe, "--dist", damaged, "--out", tmp_path / "git", *bound]
    assert_refused(invoke(*git), LABEL, "--force")
    assert invoke(*git, "--force").returncode == 0
    forced = run("push", damaged, *bound, "--force")
    assert forced.returncode == 0, forced.stderr
    assert "model.safetensors" in dict(hub.repos["local/tiny-llama-GPTQ"].tree("eight"))


@pytest.mark.parametrize("value", ["0", "-1", "often", "true", ".inf"])
def test_a_bound_is_a_positive_number(invoke: Command, tiny_recipe: Path, value: str) -> None:
    assert_refused(invoke("validate", tiny_recipe, "--set", f"measure.max_kl={value}"), "measure.max_kl")
