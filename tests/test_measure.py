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
from quantize.measuring import store
from quantize.recipe.schema import Calibration, Corpus, Model
from quantize.source import resolve
from quantize.source.streamed import StreamedModel

LENGTH, SAMPLES = 48, 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out text: the source of a standard module."""
    path = tmp_path_factory.mktemp("texts") / "held-out.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


Rows = dict[str, dict[str, float]]


def options(text: Path | str) -> list[str]:
    settings = {"dataset": text, "samples": SAMPLES, "sequence_length": LENGTH}
    return [word for key, value in settings.items() for word in ("--set", f"measure.{key}={value}")]


def measured(invoke: Any, recipe: Path, dist: Path, text: Path | str, *more: Any) -> dict[str, Any]:
    result = invoke("measure", recipe, "--dist", dist, *options(text), "--device", "cpu", "--json", *more)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def rows(invoke: Any, tiny_recipe: Path, dist: Path, text: Path) -> Rows:
    return {row["branch"]: row for row in measured(invoke, tiny_recipe, dist, text)["branches"]}


def plain_logits(folder: Path, ids: torch.Tensor, reader: BranchReader | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        if reader is not None and isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            module.weight.data = reader.weight(name)
    with torch.no_grad():
        return model(ids).logits[:, :-1].log_softmax(dim=-1)


def test_figures_equal_plain_transformers(rows: Rows, tiny_llama: Path, dist: Path, text: Path) -> None:
    source = resolve(Model(source=str(tiny_llama)), weights=True)
    wish = Calibration(dataset=[Corpus(file=str(text))], samples=SAMPLES, sequence_length=LENGTH)
    ids = torch.from_numpy(sample_tokens(wish, load_tokenizer(source)).ids)
    branch = next(path for path in dist.glob("*/main") if path.is_dir())
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


def test_figures_go_into_the_manifest_and_are_not_measured_twice(
    invoke: Any, tiny_recipe: Path, dist: Path, text: Path
) -> None:
    first = measured(invoke, tiny_recipe, dist, text)
    manifest = next(dist.glob("*/main/quantize-manifest.json"))
    quality = json.loads(manifest.read_text())["quality"]
    assert quality["kl_divergence"] == first["branches"][1]["kl_divergence"]
    assert quality["noise_floor"] < 1e-6 < quality["kl_divergence"]
    assert (quality["text"], quality["tokens"]) == (text.name, SAMPLES * LENGTH)
    before = manifest.read_bytes()
    result = invoke("measure", tiny_recipe, "--dist", dist, *options(text), "--device", "cpu")
    assert "measuring" not in result.stderr
    assert manifest.read_bytes() == before
    assert invoke("plan", tiny_recipe, "--dist", dist, "--only", "main", "--check").returncode == 0  # still up to date


def test_known_outputs_of_the_source_change_no_figure(invoke: Any, tiny_recipe: Path, dist: Path, text: Path) -> None:
    first = measured(invoke, tiny_recipe, dist, text)
    assert measured(invoke, tiny_recipe, dist, text, "--again") == first


def test_an_interrupted_measurement_goes_on_where_it_was(
    invoke: Any, tiny_recipe: Path, dist: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "INTERIM_SECONDS", 0.0)
    blocks: list[int] = []
    run = StreamedModel.run

    def interrupted(self: StreamedModel, index: int, block: Any, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        blocks.append(index)
        if index == 2 and blocks.count(2) == 1:
            raise KeyboardInterrupt
        return run(self, index, block, hidden, *more)

    monkeypatch.setattr(StreamedModel, "run", interrupted)
    assert invoke("measure", tiny_recipe, "--dist", dist, *options(text), "--device", "cpu").returncode == 130
    blocks.clear()
    blocks += [2]  # it has been interrupted once
    resumed = measured(invoke, tiny_recipe, dist, text)
    assert set(blocks) == {2}
    assert not list((tmp_path / "cache" / "measure").glob("*-interim"))
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "other"))
    assert measured(invoke, tiny_recipe, dist, text, "--again") == resumed


def test_measuring_on_the_calibration_text_is_refused_unless_one_insists(
    invoke: Any, tiny_recipe: Path, dist: Path
) -> None:
    result = invoke("measure", tiny_recipe, "--dist", dist, *options("pydoc"))
    assert_refused(result, "calibration text", "measure.allow_calibration_text")
    insisted = measured(invoke, tiny_recipe, dist, "pydoc", "--set", "measure.allow_calibration_text=true")
    assert insisted["on_calibration_text"] is True


def test_the_text_that_auto_takes_is_another_than_the_calibrations(invoke: Any, tiny_recipe: Path, dist: Path) -> None:
    found = measured(invoke, tiny_recipe, dist, "auto")
    assert (found["text"], found["on_calibration_text"]) == ("docstrings", False)


def test_nothing_built_is_said(invoke: Any, tiny_recipe: Path, tmp_path: Path, text: Path) -> None:
    result = invoke("measure", tiny_recipe, "--dist", tmp_path, *options(text))
    assert_refused(result, "no branch", "quantize build")


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
