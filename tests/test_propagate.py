"""``propagate: quantized``: each branch's statistics are of its own activations, whatever else is built with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import write_recipe
from transformers import AutoModelForCausalLM

import quantize
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.formats.reader import BranchReader
from quantize.methods.asymmetric import DAMP_PERCENT, SHARE
from quantize.methods.gptq import GptqParameters, solve

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: own, bits: 3, group_size: 32, desc_act: true, propagate: quantized}
    - {branch: own-too, bits: 4, group_size: 64, propagate: quantized}
"""
SETTINGS = {"samples": 4, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> quantize.building.BuildResult:
    folder = tmp_path_factory.mktemp("propagate")
    recipe = write_recipe(folder / "recipe.yaml", tiny_llama, VARIANTS, **SETTINGS)
    return quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=folder / "dist", device="cpu"))


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def folder_of(built: quantize.building.BuildResult, branch: str) -> Path:
    return next(item.folder for item in built.plan.variants if item.branch == branch)


def capture(inputs: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])

    return hook


def linear_inputs(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear of a whole model reads, as rows."""
    inputs: dict[str, torch.Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    handles = [linear.register_forward_pre_hook(capture(inputs, name)) for name, linear in linears.items()]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return inputs


def test_equals_a_block_by_block_reference(built: quantize.building.BuildResult) -> None:
    """Whole-model hooks: quantize block after block in a plain model, each from what it is really fed."""
    source = built.plan.source
    calibration = built.plan.recipe.calibration
    ids = torch.from_numpy(sample_tokens(calibration, load_tokenizer(source)).ids)
    model, plain = (AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32) for _ in range(2))
    sources = linear_inputs(plain, ids)
    reader = BranchReader(folder_of(built, "own"))
    for index, block in enumerate(model.model.layers):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        drifted = linear_inputs(model, ids)
        for name, linear in linears.items():
            inputs, meant = drifted[f"model.layers.{index}.{name}"], sources[f"model.layers.{index}.{name}"]
            hessian, weight = inputs.t() @ inputs, linear.weight.detach().double()
            # least squares for W S^T = W* X^T, damped, and a part of the way there
            damped = hessian.double() + DAMP_PERCENT * hessian.diagonal().double().mean() * torch.eye(len(hessian))
            whole = torch.linalg.solve(damped, ((meant - inputs).t() @ inputs).double().t() @ weight.t()).t()
            target = (weight + SHARE * whole).float()
            wish = GptqParameters(3, 32, True, damp_percent=0.1)
            (expected,) = solve(target, hessian, [wish])
            found = reader.weight(f"model.layers.{index}.{name}")
            differing = (found - expected.dequantize()).abs() > 1e-6
            assert float(differing.float().mean()) < 0.02, f"{index}.{name}"
            linear.weight.data = found


def test_differs_from_the_sources_statistics_after_the_first_block(
    built: quantize.building.BuildResult, tiny_llama: Path, tmp_path: Path
) -> None:
    shared = write_recipe(
        tmp_path / "shared.yaml",
        tiny_llama,
        "  variants:\n    - {branch: own-too, bits: 4, group_size: 64}\n",
        **SETTINGS,
    )
    other = quantize.build(quantize.load_recipe(shared), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    ours, theirs = BranchReader(folder_of(built, "own-too")), BranchReader(folder_of(other, "own-too"))
    name = "self_attn.q_proj"
    assert torch.equal(ours.weight(f"model.layers.0.{name}"), theirs.weight(f"model.layers.0.{name}"))
    assert not torch.equal(ours.weight(f"model.layers.2.{name}"), theirs.weight(f"model.layers.2.{name}"))


@pytest.mark.parametrize("branch", ["main", "own", "own-too"])
def test_a_branch_alone_equals_the_branch_in_company(
    built: quantize.building.BuildResult, tmp_path: Path, branch: str
) -> None:
    alone = quantize.build(built.plan.loaded, quantize.BuildOptions(dist=tmp_path, only=(branch,), device="cpu"))
    assert weights(folder_of(alone, branch)) == weights(folder_of(built, branch))


def test_auto_shares_the_sources_statistics_at_every_width(tiny_llama: Path, tmp_path: Path) -> None:
    body = "  group_size: 32\n  matrix: {bits: [8, 4, 3, 2]}\n"
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_llama, body)
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=tmp_path / "dist"))
    chosen = {item.variant.bits: item.variant.propagate for item in plan.variants}
    assert chosen == {8: "source", 4: "source", 3: "source", 2: "source"}


def test_auto_and_what_it_becomes_are_the_same_branch(
    built: quantize.building.BuildResult, tiny_llama: Path, tmp_path: Path
) -> None:
    body = VARIANTS.replace("bits: 4, group_size: 32", "bits: 4, group_size: 32, propagate: source")
    silent = write_recipe(tmp_path / "recipe.yaml", tiny_llama, body, **SETTINGS)
    again = quantize.plan(quantize.load_recipe(silent), quantize.PlanOptions(dist=built.plan.dist))
    assert {item.branch: item.state for item in again.variants}["main"] == "fresh"


def test_stages_share_out_the_time_of_the_build(built: quantize.building.BuildResult) -> None:
    assert {"load", "forward", "statistics", "solve", "pack", "write"} <= built.seconds.keys()
    assert min(built.seconds.values()) >= 0
