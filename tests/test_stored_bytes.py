"""A Conv1D stores its weight transposed; where it is square, no shape says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WIDTH, write_model, write_recipe
from transformers import AutoModelForCausalLM

import quantize
from quantize.formats.reader import BranchReader
from quantize.methods.awq import no_smaller_than_half
from quantize.methods.gptq import GptqParameters, solve
from quantize.recipe.schema import Model
from quantize.source.resolve import resolve
from quantize.verifying.forward import logits_of
from quantize.verifying.tensors import check_tensors

BODY = "  variants: [{bits: 8, group_size: 32}]\nawq:\n  variants: [{group_size: 32}]\n"
SQUARE = "transformer.h.1.attn.c_proj"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny", "gpt2", dtype=torch.float32)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dist(gpt2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Built in the stored dtype, and in another one, for which weights are read again."""
    folder = tmp_path_factory.mktemp("built")
    recipe = write_recipe(folder / "r.yaml", gpt2, BODY, compute_dtype=request.param)
    quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=folder / "dist", device="cpu"))
    return folder / "dist"


def test_square_weights_are_quantized_as_they_are(gpt2: Path, dist: Path) -> None:
    weight = load_file(gpt2 / "model.safetensors")[f"{SQUARE}.weight"]
    assert weight.shape == (WIDTH, WIDTH)
    found = BranchReader(dist / "tiny-GPTQ" / "main").weight(SQUARE)
    assert float((found - weight.t()).norm()) < 0.02 * float(weight.norm())


@pytest.mark.parametrize("method", ["GPTQ", "AWQ"])
def test_branches_answer_nearly_as_their_source_and_verify(gpt2: Path, dist: Path, method: str) -> None:
    branch = dist / f"tiny-{method}" / "main"
    assert check_tensors(branch, resolve(Model(source=str(gpt2)), weights=True)).outcome == "ok"
    ids = torch.randint(3, 380, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32).eval()(ids).logits[0].log_softmax(-1)
    found = logits_of(branch, ids[0].tolist()).log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.02


@pytest.mark.parametrize("method", ["GPTQ", "AWQ"])
def test_verify_catches_a_square_weight_that_was_transposed(
    gpt2: Path, dist: Path, tmp_path: Path, method: str
) -> None:
    turned = Path(shutil.copytree(gpt2, tmp_path / "tiny"))
    tensors = load_file(turned / "model.safetensors")
    tensors[f"{SQUARE}.weight"] = tensors[f"{SQUARE}.weight"].t().contiguous()
    save_file(tensors, turned / "model.safetensors", {"format": "pt"})
    check = check_tensors(dist / f"tiny-{method}" / "main", resolve(Model(source=str(turned)), weights=True))
    assert check.outcome == "failed"
    assert SQUARE in check.detail


# -- scales that float16 cannot hold


def test_weights_too_small_for_float16_scales_are_said(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    lost, coarse, faint = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
    tensors[f"{lost}.weight"] *= 1e-9
    tensors[f"{coarse}.weight"] *= 1e-4
    tensors[f"{faint}.weight"] *= 1e-30
    tensors["model.layers.0.self_attn.v_proj.weight"][3] *= 1e-25  # a dead row, which does not matter
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    body = "  variants: [{group_size: 32}]\nawq:\n  variants: [{group_size: 32}]\n"
    recipe = write_recipe(tmp_path / "r.yaml", folder, body)
    result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    for label, method in (("gptq/main", "GPTQ"), ("awq/main", "AWQ")):
        assert result.oddities[label]["scale_underflow"] == [lost, faint]
        branch = tmp_path / "dist" / f"tiny-{method}" / "main"
        rows = {row["module"]: row for row in json.loads((branch / "quantize-manifest.json").read_text())["ledger"]}
        reader = BranchReader(branch)
        for module in (lost, faint):
            assert float(reader.weight(module).abs().max()) < 1e-6
            assert rows[module]["relative_error"] == pytest.approx(1, abs=1e-3)
        assert rows[coarse]["relative_error"] < 0.1
    strict = quantize.load_recipe(recipe, ["gptq.fail_on=[scale_underflow]"])
    with pytest.raises(quantize.errors.SolveError, match=r"scale_underflow, which gptq\.fail_on"):
        quantize.build(strict, quantize.BuildOptions(dist=tmp_path / "other", device="cpu"))


def test_a_fold_leaves_its_producer_steps_that_float16_holds() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [1e-4], [1e-5], [1e-9]]
    )
    scale = no_smaller_than_half(weight, torch.full((4,), 256.0), bits=4)
    assert scale[0] == 256
    assert 1 < scale[2] < scale[1] < 256
    assert scale[3] == 1  # lost as it is
    (solution,) = solve(weight[:3] / scale[:3, None], torch.eye(64), [GptqParameters(4, 32)])
    assert float(solution.row_error.sum()) < 0.01 * float((weight[:3] / scale[:3, None]).square().sum())
    assert torch.equal(no_smaller_than_half(weight, torch.full((4,), 0.1), bits=4), torch.full((4,), 0.1))
