"""Levels measured from their own bytes: tensors turned back whatever the converter did, figures as llama.cpp's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from conftest import HANGS, Command
from safetensors.torch import load_file
from tiny import SMALL, wide_model

import quantize
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.errors import GgufError
from quantize.formats.gguf_reader import open_gguf
from quantize.gguf import worker_logits
from quantize.measuring.gguf import check_levels_can_be_read_back, open_levels
from quantize.recipe.schema import Calibration, Corpus

pytestmark = [*needs.LLAMA_CPP, pytest.mark.usefixtures("forked_converter")]

ARCHITECTURES = {
    "llama": {},
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_ctx": 256},
}
RECIPE = (
    SMALL
    + """\
calibration: {{dataset: pydoc, samples: 4, sequence_length: 64, compute_dtype: float32}}
measure: {{samples: 4, sequence_length: 64}}
gguf: {{levels: [Q4_K_M, IQ2_XXS, F16], max_file_size: 15MB}}
"""
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensors_come_back_as_the_checkpoint_has_them(
    architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if architecture == "llama":
        source = request.getfixturevalue("small_llama")
    else:  # the converter reads no SentencePiece tokenizer of this one
        demo, sizes = request.getfixturevalue("tokenizer_folder"), ARCHITECTURES[architecture]
        source = wide_model(tmp_path / "m", demo, architecture=architecture, **sizes)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source))
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=tmp_path / "dist"))
    assert plan.gguf
    conversion = plan.gguf.conversion
    tensors = load_file(source / "model.safetensors")
    became = conversion.header().converted
    readers = open_levels({"full": [conversion.make()]}, conversion.path, became, tensors.__getitem__)
    seen = 0
    for name, wanted in tensors.items():
        found = readers["full"].tensor(name)
        torch.testing.assert_close(found, wanted.float(), rtol=2e-3, atol=1e-6)
        seen += name in became
    assert seen > len(tensors) // 2
    linear = plan.table.linears[0]
    assert readers["full"].weight(linear.name).shape == (linear.out_features, linear.in_features)


def write_file(path: Path, tensors: dict[str, torch.Tensor], quantized: tuple[str, ...] = ()) -> Path:
    """A GGUF with these tensors: matrices as float16, or Q8_0, vectors as float32."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize as quantize_rows

    writer = GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        values = tensor.contiguous().float().numpy()
        if name in quantized:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"blk.{name}", quantize_rows(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.{name}", values.astype(np.float16) if tensor.dim() > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_our_reader_answers_as_the_packages(tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    path = tmp_path / "f.gguf"
    writer = GGUFWriter(path, "llama")
    for number, (kind, values) in enumerate([
        (GGUFValueType.STRING, ["a", "", "ein längerer", "x" * 300]), (GGUFValueType.STRING, ["one"]),
        (GGUFValueType.FLOAT32, [0.5, -1.0]), (GGUFValueType.INT32, [1, -2, 3]), (GGUFValueType.BOOL, [True, False]),
        (GGUFValueType.UINT64, [2**40]),
    ]):  # fmt: skip
        writer.add_key_value(f"x.{number}", values, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_uint32("x.scalar", 7)
    writer.add_tensor("t", np.arange(64, dtype=np.float16).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = open_gguf(path), GGUFReader(path)
    assert type(ours) is not type(theirs)
    assert list(ours.fields) == list(theirs.fields)
    for name, wanted in theirs.fields.items():
        found = ours.fields[name]
        assert (found.offset, found.name, found.data, found.types, found.contents()) == (
            wanted.offset, wanted.name, wanted.data, wanted.types, wanted.contents(),
        )  # fmt: skip
        assert [part.tobytes() for part in found.parts] == [part.tobytes() for part in wanted.parts]
    assert [(tensor.name, tensor.data_offset, tensor.data.tobytes()) for tensor in ours.tensors] == [
        (tensor.name, tensor.data_offset, tensor.data.tobytes()) for tensor in theirs.tensors
    ]


def test_every_rearrangement_of_a_converter_is_found(tmp_path: Path) -> None:
    """Rows in another order, a shift, a scale, a transpose, a padded vocabulary, splits, stacks."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    source = {name: random(48, 32) for name in ("rows", "transposed", "padded", "tripled")}
    source |= {"norm": random(32), "constants": torch.arange(4.0), "conv": random(8, 1, 4), "kv": random(2 * 12, 32)}
    source |= {f"mlp.experts.{number}.up": random(16, 32) for number in range(3)}
    source |= {"stacked": random(3, 32, 2 * 16)}
    order = torch.randperm(48, generator=generator)
    key, value = source["kv"].view(2, 12, 32).split([8, 4], dim=1)
    written = {
        "rows": source["rows"][order], "transposed": source["transposed"].t()[torch.randperm(32, generator=generator)],
        "padded": torch.cat([source["padded"], torch.zeros(16, 32)]), "tripled": source["tripled"] * 3,
        "norm": source["norm"] + 1, "conv": source["conv"].squeeze(1), "k_b": key.transpose(1, 2), "v_b": value,
        "up_exps": torch.stack([source[f"mlp.experts.{number}.up"] for number in range(3)]),
        "gate": source["stacked"][..., ::2].transpose(1, 2), "up": source["stacked"][..., 1::2].transpose(1, 2),
    }  # fmt: skip
    path = write_file(tmp_path / "f.gguf", written)
    became = {name: [f"blk.{name}"] for name in written if name in source}
    became |= {"kv": ["blk.k_b", "blk.v_b"], "stacked": ["blk.gate", "blk.up"]}
    became |= {f"mlp.experts.{number}.up": ["blk.up_exps"] for number in range(3)}
    reader = open_levels({"f": [path]}, path, became, source.__getitem__)["f"]
    for name, wanted in source.items():
        torch.testing.assert_close(reader.tensor(name), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_every_size_come_back_from_one_plus(dtype: torch.dtype, tmp_path: Path) -> None:
    """Dead channels (0), weights of -1 that are stored as 0, tiny ones and hundreds, as real checkpoints have them."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(64, generator=generator)
    norms = {
        "usual": some, "tiny": some * 1e-4, "dead": some * (some > 0), "minus_one": torch.where(some > 0, -1.0, some),
        "hundreds": some.abs() * 300 + 100, "zeros": torch.zeros(64), "near_minus_one": some * 1e-3 - 1,
    }  # fmt: skip
    source = {name: norm.to(dtype) for name, norm in norms.items()} | {
        f"plain_{name}": norm.to(dtype) for name, norm in norms.items()
    }
    converted = {  # as the converter does: bfloat16 is widened first, halves are added as halves
        name: (tensor.float() if dtype == torch.bfloat16 else tensor) + (0 if name.startswith("plain") else 1)
        for name, tensor in source.items()
    }
    path = write_file(tmp_path / "f.gguf", converted)
    became = {name: [f"blk.{name}"] for name in source}
    reader = open_levels({"f": [path]}, path, became, source.__getitem__)["f"]
    for name, wanted in source.items():
        error = 2.0**-10 * (1 + wanted.float().abs()) if dtype == torch.float16 else 1e-4
        assert ((reader.tensor(name) - wanted.float()).abs() <= error).all(), name


def test_what_cannot_be_turned_back_is_the_sources_unless_it_is_quantized(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    source = {"decay": torch.randn(32, generator=generator), "odd": torch.randn(48, 32, generator=generator)}
    written = {"decay": -source["decay"].exp(), "odd": source["odd"] ** 3}
    full = write_file(tmp_path / "full.gguf", written)
    level = write_file(tmp_path / "level.gguf", written, quantized=("odd",))
    became = {name: [f"blk.{name}"] for name in source}
    reader = open_levels({"level": [level]}, full, became, source.__getitem__)["level"]
    assert torch.equal(reader.tensor("decay"), source["decay"])
    refusal = r"odd: the converter made blk\.odd of it in a way that cannot be turned back"
    with pytest.raises(GgufError, match=refusal):
        reader.tensor("odd")
    check_levels_can_be_read_back(full, became, source.__getitem__, quantized=())
    with pytest.raises(GgufError, match=refusal):
        check_levels_can_be_read_back(full, became, source.__getitem__, quantized={"blk.odd"})


def test_figures_of_levels_are_llama_cpps(small_llama: Path, tmp_path: Path, invoke: Command) -> None:
    recipe, dist = tmp_path / "r.yaml", tmp_path / "dist"
    recipe.write_text(RECIPE.format(source=small_llama))
    built = invoke("build", recipe, "--dist", dist, "--device", "cpu", "--measure", "--json")
    assert built.returncode == 0, built.stderr
    rows = {row["branch"]: row for row in json.loads(built.stdout)["quality"]["branches"]}
    folder = dist / "small-GGUF" / "main"
    manifest = json.loads((folder / "quantize-manifest.json").read_text())
    plan = quantize.plan(quantize.load_recipe(recipe), quantize.PlanOptions(dist=dist))
    text = Calibration(dataset=[Corpus(preset="docstrings")], samples=4, sequence_length=64)
    ids = sample_tokens(text, load_tokenizer(plan.source)).ids
    assert plan.gguf
    levels = {level: manifest["levels"][level] for level in ("Q4_K_M", "IQ2_XXS")}
    firsts = [folder / min(entry["files"]) for entry in levels.values()]
    reference, *found = llama_logits([plan.gguf.conversion.path, *firsts], ids, tmp_path)
    for (level, entry), theirs in zip(levels.items(), found, strict=True):
        assert entry["quality"]["kl_divergence"] == rows[f"gguf/{level}"]["kl_divergence"]
        loss = -theirs.gather(-1, torch.from_numpy(ids[:, 1:, None]))
        assert rows[f"gguf/{level}"]["perplexity"] == pytest.approx(math.exp(float(loss.mean())), rel=0.01)
        divergence = float((reference.exp() * (reference - theirs)).sum(-1).mean())
        assert rows[f"gguf/{level}"]["kl_divergence"] == pytest.approx(divergence, rel=0.1)
    assert rows["gguf/F16"]["kl_divergence"] < 1e-6 < rows["gguf/Q4_K_M"]["kl_divergence"]
    verified = invoke("verify", folder, "--source", small_llama, "--json")
    assert verified.returncode == 0, verified.stdout
    checks = json.loads(verified.stdout)[0]["checks"]
    assert [check["outcome"] for check in checks] == ["ok"] * 4  # hashes and three levels
    assert all("what the weights give" in check["detail"] for check in checks[1:])
    assert invoke("card", recipe, "--dist", dist).returncode == 0
    card = (folder / "README.md").read_text()
    assert card.count("| llama-cpp-python 0.3.36 |") == 3
    assert "| PPL | KLD | Top-1 |" in card
    assert f"| {rows['gguf/Q4_K_M']['kl_divergence']:.4f} |" in card
    assert "![Size against KL divergence of 3 variants" in card
    assert (folder / "quality.svg").read_bytes().startswith(b"<svg")


def llama_logits(models: list[Path], windows: np.ndarray, scratch: Path) -> list[torch.Tensor]:
    """llama.cpp's log-probabilities [windows, length - 1, vocabulary] of each model, all made in one process."""
    wanted = []
    for number, window in enumerate(windows):
        np.save(scratch / f"ids{number}.npy", window)
        for place, model in enumerate(models):
            logits = scratch / f"out{place}-{number}.npy"
            ids = str(scratch / f"ids{number}.npy")
            wanted.append({"model": str(model), "ids": ids, "logits": str(logits), "threads": 2, "text": "x"})
    code = "import json, sys, worker_logits\nfor one in json.load(sys.stdin): worker_logits.run(one)"
    subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(wanted), text=True, check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(worker_logits.__file__).parent)}, timeout=HANGS,
    )  # fmt: skip
    numbers = range(len(windows))
    raw = [[np.load(scratch / f"out{place}-{number}.npy")[:-1] for number in numbers] for place in range(len(models))]
    return [torch.from_numpy(np.stack(one)).double().log_softmax(-1) for one in raw]
