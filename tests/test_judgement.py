"""A variant that was measured to be broken never looks finished."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from outcome import assert_refused
from safetensors import safe_open
from safetensors.torch import save_file
from test_measure import options, text  # noqa: F401

from quantize.publishing.judgement import judged
from quantize.publishing.quality import Point


def point(label: str, divergence: float, perplexity: float = 20.0) -> Point:
    quality = {"key": "k", "kl_divergence": divergence, "perplexity": perplexity, "top1_agreement": 0.5}
    return Point(label, "gptq", label, 1000, quality)


@pytest.mark.parametrize(
    ("divergences", "bits", "bound", "broken"),
    [
        ({"a": 0.13, "b": 6.1}, {"a": 4, "b": 4}, None, {"b"}),
        ({"a": 0.02, "b": 0.29}, {"a": 4, "b": 4}, None, set()),
        ({"a": 0.02, "b": 0.31}, {"a": 4, "b": 4}, None, {"b"}),
        ({"a": 0.02, "b": 0.31}, {"a": 8, "b": 4}, None, set()),
        ({"a": 0.02, "b": 3.0}, {"a": 4, "b": 2}, None, set()),
        ({"a": 4.1}, {"a": 2}, None, {"a"}),
        ({"a": 0.51}, {"a": 8.5}, None, {"a"}),
        ({"a": 6.1, "b": 0.2}, {"a": 4, "b": 4}, 7.0, set()),
        ({"a": 0.2, "b": 0.02}, {"a": 4, "b": 4}, 0.1, {"a"}),
        ({"a": math.nan, "b": math.inf}, {"a": 2, "b": 2}, 100.0, {"a", "b"}),
    ],
)
def test_bounds(divergences: dict[str, float], bits: dict[str, float], bound: float | None, broken: set[str]) -> None:
    points = [point(label, divergence) for label, divergence in divergences.items()]
    assert judged(points, bits, bound).keys() == broken


def damage(branch: Path) -> None:
    """Make every scale of a branch five times as large, as a fault of a solver might."""
    path = branch / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name] = tensors[name] * 5
    save_file(tensors, path, metadata)


def test_a_broken_branch_is_an_error_everywhere(
    invoke: Any,
    tiny_recipe: Path,
    dist: Path,
    text: Path,  # noqa: F811
) -> None:
    chosen = [tiny_recipe, "--dist", dist, *options(text)]
    bound = ["--set", "measure.max_kl=0.05"]  # random weights diverge little, whatever is done to them
    branch = dist / "tiny-llama-GPTQ" / "main"
    assert invoke("measure", *chosen, *bound, "--only", "gptq/main").returncode == 0
    damage(branch)
    again = invoke("measure", *chosen, *bound, "--again", "--json")
    assert_refused(again, "gptq/main: its mean KL divergence from the source is", "above the bound of 0.05", code=1)
    assert json.loads(again.stdout)["branches"], "what was measured is told all the same"

    built = invoke("build", *chosen, *bound)
    assert_refused(built, "gptq/main", "not fit for use", code=1)
    shown = json.loads(invoke("status", *chosen, *bound, "--json").stdout)["branches"]
    assert ["above the bound" in (row["broken"] or "") for row in shown if row["branch"] == "gptq/main"] == [True]
    assert "BROKEN" in invoke("status", *chosen, *bound).stdout
    assert "**Do not use `gptq/main`**" in (branch / "README.md").read_text()
    assert_refused(invoke("git", *chosen, *bound, "--out", dist.parent / "repos"), "not published", code=1)
    assert not (dist.parent / "repos").exists()

    assert invoke("measure", *chosen, "--set", "measure.max_kl=50").returncode == 0, "the recipe may know better"
