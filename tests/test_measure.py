"""Measured quality equals what plain transformers gives for the source and for the dequantized weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import assert_refused
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.formats.reader import BranchReader
from quantize.recipe.schema import Calibration, Corpus

LENGTH, SAMPLES = 48, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out text: the source of a standard module."""
    path = tmp_path_factory.mktemp("texts") / "held-out.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def rows(invoke: Any, tiny_recipe: Path, finished: Path, text: Path) -> dict[str, dict[str, float]]:
    result = invoke(
        "measure", tiny_recipe, "--dist", finished, "--text", text,
        "--samples", SAMPLES, "--length", LENGTH, "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {row["branch"]: row for row in json.loads(result.stdout)}


def plain_logits(folder: Path, ids: torch.Tensor, reader: BranchReader | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if reader is not None and isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            module.weight.data = reader.weight(name)
    with torch.no_grad():
        return model(ids).logits[:, :-1].log_softmax(dim=-1)


def test_figures_equal_plain_transformers(
    rows: dict[str, dict[str, float]], tiny_llama: Path, finished: Path, text: Path
) -> None:
    source = type("Folder", (), {"folder": tiny_llama, "named": "tiny"})()
    wish = Calibration(dataset=[Corpus(file=str(text))], samples=SAMPLES, sequence_length=LENGTH)
    ids = torch.from_numpy(sample_tokens(wish, load_tokenizer(source)).ids)
    branch = next(path for path in finished.glob("*/main") if path.is_dir())
    reference = plain_logits(tiny_llama, ids)
    quantized = plain_logits(tiny_llama, ids, BranchReader(branch))
    successors = ids[:, 1:, None]
    for name, chances in (("source", reference), ("gptq/main", quantized)):
        perplexity = math.exp(-float(chances.gather(-1, successors).mean()))
        assert rows[name]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    divergence = float((reference.exp() * (reference - quantized)).sum(dim=-1).mean())
    assert divergence > 1e-5
    assert rows["gptq/main"]["kl_divergence"] == pytest.approx(divergence, rel=1e-2)
    agreement = float((reference.argmax(-1) == quantized.argmax(-1)).double().mean())
    assert rows["gptq/main"]["top1_agreement"] == pytest.approx(agreement, abs=0.01)


def test_the_source_is_no_distance_from_itself(rows: dict[str, dict[str, float]]) -> None:
    assert abs(rows["source"]["kl_divergence"]) < 1e-6
    assert rows["source"]["top1_agreement"] == 1.0


def test_measuring_on_the_calibration_text_is_refused(
    invoke: Any, tiny_recipe: Path, finished: Path, text: Path
) -> None:
    result = invoke("measure", tiny_recipe, "--dist", finished, "--text", text, "--set", f"calibration.dataset={text}")
    assert_refused(result, "calibration text", text.name)


def test_nothing_built_is_said(invoke: Any, tiny_recipe: Path, tmp_path: Path, text: Path) -> None:
    assert_refused(invoke("measure", tiny_recipe, "--dist", tmp_path, "--text", text), "no branch", "quantize build")


def test_a_dataset_of_the_hub_library_calibrates(tmp_path: Path) -> None:
    """The real ``datasets`` library, on a dataset that lies in a folder instead of on a hub."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"body": f"line {number}: " + "words and words " * 9}) for number in range(40)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wish = Calibration(dataset=[Corpus(hub=str(folder), column="body")], samples=3, sequence_length=32)
    tokens = sample_tokens(wish, tokenizer())
    assert tokens.ids.shape == (3, 32)
    assert "words" in tokenizer().decode(tokens.ids[0])
