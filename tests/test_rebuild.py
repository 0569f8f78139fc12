"""A release repeated from its manifests: the same bytes, or a plain word about what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import needs
import pytest
from conftest import Command
from outcome import assert_refused
from tiny import SMALL, write_recipe

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32, damp_percent: 0.05}
    - {branch: other, bits: 8, group_size: -1, desc_act: true, sym: false}
awq:
  mse: false
  variants:
    - {branch: main, group_size: 32}
"""
GGUF = (
    SMALL
    + """\
calibration: {{dataset: pydoc, samples: 2, sequence_length: 64, compute_dtype: float32}}
gguf: {{levels: [Q4_K_M, Q8_0, IQ2_XXS], tensor_types: {{token_embd: q8_0}}, max_file_size: 15MB}}
"""
)
BRANCH = "gptq: {variants: [{group_size: 64}]}\n"


@pytest.fixture(scope="module")
def release(tiny_llama: Path, invoke: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished dist of three branches, calibrated on a text file, and that file."""
    folder = tmp_path_factory.mktemp("release")
    text = folder / "text.txt"
    text.write_text("A text of one's own, long enough for a few windows. " * 400)
    recipe = write_recipe(folder / "r.yaml", tiny_llama, VARIANTS, samples=2, compute_dtype="float32")
    changes = ("--set", f"calibration.dataset={text}", "--set", "calibration.batch_tokens=64")
    built = invoke("build", recipe, "--dist", folder / "dist", "--device", "cpu", *changes)
    assert built.returncode == 0, built.stderr
    return folder / "dist", text


def test_a_whole_release_comes_out_in_the_same_bytes(
    release: tuple[Path, Path], tiny_llama: Path, invoke: Command
) -> None:
    dist, text = release
    done = invoke("rebuild", dist, "--source", tiny_llama, "--text", text, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = {one["label"]: one for one in json.loads(done.stdout)}
    assert set(found) == {"gptq/main", "gptq/other", "awq/main"}
    for one in found.values():
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(one["equal"])
        assert one["changed"] == []


def test_another_text_or_version_shows(
    release: tuple[Path, Path], tiny_llama: Path, invoke: Command, tmp_path: Path
) -> None:
    dist, text = release
    branch = Path(shutil.copytree(next(dist.glob("*-GPTQ")) / "main", tmp_path / "main"))
    manifest = branch / "quantize-manifest.json"
    data = json.loads(manifest.read_text())
    data["versions"]["torch"] = "1.0"
    data["files"]["model.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(data))
    options = ("--source", tiny_llama, "--text", text, "--device", "cpu")
    shown = invoke("rebuild", manifest, "--into", tmp_path / "again", *options)
    assert shown.returncode == 3, shown.stderr
    assert "differs" in shown.stdout
    assert "torch: 1.0 then" in shown.stdout
    assert next((tmp_path / "again").glob("*-GPTQ/main/model.safetensors")).is_file()


@pytest.mark.usefixtures("forked_converter")
@pytest.mark.parametrize("sections", [pytest.param(name, marks=needs.LLAMA_CPP) for name in ("levels", "both")])
def test_gguf_levels_come_out_in_the_same_bytes(
    small_llama: Path, invoke: Command, tmp_path: Path, sections: str
) -> None:
    source = small_llama
    recipe, dist = tmp_path / "r.yaml", tmp_path / "dist"
    recipe.write_text(GGUF.format(source=source) + (BRANCH if sections == "both" else ""))
    built = invoke("build", recipe, "--dist", dist, "--device", "cpu")
    assert built.returncode == 0, built.stderr
    done = invoke("rebuild", dist, "--source", source, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = {one["label"]: one for one in json.loads(done.stdout)}
    assert ("gptq/main" in found) == (sections == "both")
    assert found["gguf/main"]["changed"] == []
    assert {path.name for path in dist.rglob("*.gguf")} <= set(found["gguf/main"]["equal"])


def test_what_is_lacking_is_said(release: tuple[Path, Path], tiny_llama: Path, invoke: Command, tmp_path: Path) -> None:
    dist, text = release
    assert_refused(invoke("rebuild", dist), "no hub id", "--source")
    assert_refused(invoke("rebuild", dist, "--source", tiny_llama), "SHA-256", "--text")
    assert_refused(invoke("rebuild", tmp_path), "no quantize-manifest.json")
    assert_refused(invoke("rebuild", text), "no manifest that can be read")
