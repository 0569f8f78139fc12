"""Calibration windows run in parts: the same statistics but for rounding, repeatable, resumable, recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from outcome import assert_refused, contents
from tiny import EVERY_WAY, write_model, write_recipe

import quantize
from quantize.building.calibration_pass import CalibrationPass
from quantize.calibration.parts import Packed, PackedStatistics, Part, add_part, cut
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.recipe.schema import Model
from quantize.source import resolve
from quantize.source.streamed import StreamedModel

SHARDED = ("--device", "cpu", "--shards", "2")


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_llama, EVERY_WAY, samples=3, compute_dtype="float32")


def test_statistics_of_parts_add_up_to_those_of_the_whole(recipe: Path, tmp_path: Path) -> None:
    loaded = quantize.load_recipe(recipe)
    plan = quantize.plan(loaded, quantize.PlanOptions(dist=tmp_path / "dist"))
    ids = sample_tokens(loaded.recipe.calibration, load_tokenizer(plan.source)).ids
    model = StreamedModel(plan.source, torch.float32, torch.device("cpu"))
    whole = Part.start(model, ids, 2, [None, None])
    parts = [Part.start(model, piece, 2, [None, None]) for piece in cut(ids, 2)]
    weights = {"self_attn.q_proj": torch.zeros(128, 128)}
    for index in range(len(model)):
        with model.block(index) as block:
            expected = whole.statistics(index, block, True)
            total, further = (part.statistics(index, block, True) for part in parts)
            before = [linear.weight.clone() for linear in model.linears(block)]
            for part in (whole, *parts):
                part.advance(index, block, 1, weights)
            assert all(torch.equal(a, b.weight) for a, b in zip(before, model.linears(block), strict=True))
            for stream, rest, wanted in zip(total, further, expected, strict=True):
                # as they come from another process
                add_part(stream, [PackedStatistics.of(one).statistics(model.linears(block)) for one in rest])
                for group, one in zip(stream, wanted, strict=True):
                    assert [linear.local for linear in group.linears] == [linear.local for linear in one.linears]
                    assert group.tokens == one.tokens == ids.size
                    torch.testing.assert_close(group.hessian, one.hessian, rtol=1e-4, atol=1e-4)
                    if one.drift is not None:
                        assert group.drift is not None
                        torch.testing.assert_close(group.drift, one.drift, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cat([part.source.hidden for part in parts]), whole.source.hidden)


def test_an_expert_that_one_part_does_not_reach_keeps_the_statistics_of_the_others(tmp_path: Path) -> None:
    source = resolve(Model(source=str(write_model(tmp_path / "mixture", "olmoe"))), weights=True)
    model = StreamedModel(source, torch.float32, torch.device("cpu"))
    ids = np.random.default_rng(3).integers(3, 380, (2, 2))  # four tokens, two of six experts for each
    whole = Part.start(model, ids, 1, [None])
    parts = [Part.start(model, piece, 1, [None]) for piece in cut(ids, 2)]
    onesided = 0
    for index in range(len(model)):
        with model.block(index) as block:
            expected = whole.statistics(index, block, True)[0]
            first, second = (part.statistics(index, block, True)[0] for part in parts)
            onesided += sum(bool(one.tokens) != bool(other.tokens) for one, other in zip(first, second, strict=True))
            add_part(first, second)
            for group, one in zip(first, expected, strict=True):
                assert group.tokens == one.tokens
                torch.testing.assert_close(group.hessian, one.hessian, rtol=1e-4, atol=1e-4)
    assert onesided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_packed_tensor_is_the_same_one(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype).t()
    again = Packed.of(tensor).tensor()
    assert again.dtype == dtype
    assert torch.equal(again, tensor)
    again += 1
    assert not torch.equal(again, tensor)


def test_an_interrupted_build_in_shards_goes_on_to_the_same_bytes(
    invoke: Command, recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CalibrationPass._keep

    def full(self: CalibrationPass, next_block: int, *rest: object) -> None:
        if next_block == 2:
            raise OSError(28, "No space left on device")
        real(self, next_block, *rest)  # type: ignore[arg-type]

    half, whole = tmp_path / "half", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr(CalibrationPass, "_keep", full)
        assert_refused(invoke("build", recipe, "--dist", half, *SHARDED), "no space left", "kept", code=1)
    done = invoke("build", recipe, "--dist", half, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert "going on after block 1 of 3" in done.stderr
    assert invoke("build", recipe, "--dist", whole, *SHARDED).returncode == 0
    assert contents(half) == contents(whole)
    manifests = [json.loads(path.read_text()) for path in whole.rglob("quantize-manifest.json")]
    assert [manifest["compute"]["shards"] for manifest in manifests] == [2, 2, 2]
    again = invoke("rebuild", next(whole.glob("*-GPTQ")) / "main", "--source", tiny_llama, "--device", "cpu")
    assert again.returncode == 0, again.stdout + again.stderr


def test_more_shards_than_windows_are_refused(invoke: Command, recipe: Path, tmp_path: Path) -> None:
    for command in ("plan", "build"):
        refused = invoke(command, recipe, "--dist", tmp_path / "dist", "--shards", "4")
        assert_refused(refused, "--shards 4", "3 windows", "at most 3")
    assert not list((tmp_path / "dist").glob("*/*/*.safetensors"))


def test_ray_that_is_not_installed_is_one_sentence(
    invoke: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = invoke("build", recipe, "--dist", tmp_path / "dist", "--ray", "auto")
    assert_refused(refused, "--ray auto", "not installed", "quantize[ray]")
