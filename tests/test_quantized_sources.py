"""Sources that are quantized already: float8 is read as bfloat16, everything else is refused by the plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from outcome import assert_refused
from safetensors.torch import load_file, save_file
from tiny import write_model, write_recipe

from quantize.source.checkpoint import read_checkpoint
from quantize.source.dequantize import read_float8
from quantize.source.float8 import Float8

BLOCKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # the shape of a matrix, that of its factors, and what the config says
    "usual, ragged": ((300, 200), (3, 2), {}),
    "configured": ((96, 64), (3, 2), {"weight_block_size": [32, 32]}),
    "one factor": ((96, 64), (), {}),
    "one a row": ((96, 64), (96, 1), {}),
    "experts": ((3, 200, 160), (3, 2, 2), {}),
    "one an expert": ((3, 96, 64), (3, 1, 1), {}),
}


def float8(matrix: torch.Tensor, factors: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8 with these factors, and what that stands for, element by element."""
    rows, columns = matrix.shape[-2:]
    spread = factors.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    codes = (matrix.float() / spread).to(torch.float8_e4m3fn)
    return codes, (codes.float() * spread).to(torch.bfloat16)


def quantized(source: Path, folder: Path) -> tuple[Path, Path]:
    """Two copies of a model: its projections in float8 with blocks of 128 x 128, and what they stand for."""
    tensors, dice = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        packed[name] = plain[name] = value.bfloat16()
        if name.endswith("_proj.weight"):
            shape = [-(-side // 128) for side in value.shape]
            factors = torch.rand(shape, generator=dice) * 1e-3 + 1e-3
            packed[name], plain[name] = float8(value, factors, (128, 128))
            packed[f"{name}_scale_inv"] = factors
            packed[name.replace(".weight", ".input_scale")] = torch.ones(())
    for made, content in (("packed", packed), ("plain", plain)):
        shutil.copytree(source, folder / made)
        save_file(content, folder / made / "model.safetensors", {"format": "pt"})
    change_config(folder / "packed", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return folder / "packed", folder / "plain"


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("configured", [True, False])
def test_a_float8_source_is_built_as_what_it_stands_for(configured: bool, tmp_path: Path, invoke: Command) -> None:
    source = write_model(tmp_path / "source", intermediate_size=160)
    packed, plain = quantized(source, tmp_path)
    if not configured:
        change_config(packed, quantization_config=None)
    built = []
    for folder in (packed, plain):
        path = write_recipe(tmp_path / f"{folder.name}.yaml", folder)
        assert invoke("build", path, "--dist", tmp_path / "dist", "--no-measure").returncode == 0
        built.append(load_file(tmp_path / "dist" / f"{folder.name}-GPTQ" / "main" / "model.safetensors"))
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(value, built[1][name]) for name, value in built[0].items())
    branch = tmp_path / "dist" / "packed-GPTQ" / "main"
    assert invoke("verify", branch, "--source", packed, "--no-load").returncode == 0
    assert json.loads((branch / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_factor_scales_its_block(name: str, tmp_path: Path) -> None:
    shape, scales, settings = BLOCKS[name]
    dice = torch.Generator().manual_seed(0)
    factors = torch.rand(scales, generator=dice) + 0.5
    block = tuple(settings.get("weight_block_size", (128, 128)))
    if name.startswith("one"):
        block = (1 if "row" in name else shape[-2], shape[-1])
    wide = factors if factors.dim() else factors.reshape(1, 1)
    codes, wanted = float8(torch.randn(shape, generator=dice), wide, block)
    save_file({"a.weight": codes, "a.weight_scale_inv": factors}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", **settings}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path)
    assert [(key, spec.dtype) for key, spec in checkpoint.tensors.items()] == [("a.weight", "BF16")]
    found = read_float8("a.weight", checkpoint.float8["a.weight"], load_file(tmp_path / "model.safetensors").get)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_factors_stands_for_itself(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    found = read_float8("a", Float8(), {"a": codes}.get)
    assert torch.equal(found.float().nan_to_num(1e9), codes.float().nan_to_num(1e9))


def test_exponents_are_factors() -> None:
    codes = torch.ones(2, 64).to(torch.float8_e4m3fn)
    stored = {"a": codes, "a_scale_inv": torch.tensor([[126, 127], [128, 130]], dtype=torch.uint8)}
    found = read_float8("a", Float8("a_scale_inv", (1, 32)), stored.get)
    assert found[:, ::32].tolist() == [[0.5, 1.0], [2.0, 8.0]]


def _factors_elsewhere(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(())


def _factors_of_another_shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(5, 7)


def _integers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int8)


def _packed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_factors_elsewhere, "a form that is not read"),
        (_factors_of_another_shape, "fits no blocks"),
        (_integers, "is I8"),
        (_packed, "q_proj.qweight"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "(compressed-tensors)"),
        ({"quantization_config": {"load_in_4bit": True}}, "(bitsandbytes)"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "(gptq)"),
    ],
)
def test_other_quantized_sources_are_refused_by_the_plan(
    change: Any, words: str, tmp_path: Path, invoke: Command
) -> None:
    source = write_model(tmp_path / "source")
    if isinstance(change, dict):
        change_config(source, **change)
    else:
        tensors = load_file(source / "model.safetensors")
        change(tensors, "model.layers.0.self_attn.q_proj.weight")
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = invoke("plan", write_recipe(tmp_path / "recipe.yaml", source), "--dist", tmp_path / "dist")
    assert_refused(done, words, "name the unquantized model instead")
