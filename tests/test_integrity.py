"""Bytes are what their hashes say: of the source while it is read, of what is unfinished, of what is published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_in_process
from outcome import assert_refused, contents
from tiny import write_model, write_recipe

from quantize.building import resumable_pass
from quantize.building.calibration_pass import CalibrationPass
from quantize.dist.resume import Unfinished
from quantize.files import digest

WAYS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: drifting, bits: 8, group_size: 64, propagate: quantized}
awq:
  variants:
    - {branch: main, bits: 4, group_size: 32}
"""
CPU = ("--device", "cpu")


def flip(path: Path, place: int | None = None) -> None:
    """Turn one bit of a file round; in the middle, where no place is given."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 128
    with path.open("r+b") as file:  # in place: the inode stays
        file.write(data)


def last_weight(path: Path) -> None:
    """Turn one bit of the last block's weights round: what is read first is as it was."""
    from quantize.formats.safetensors_header import file_header

    flip(path, file_header(path).places["model.layers.2.mlp.down_proj.weight"][0] + 65)  # a sign


def published(dist: Path) -> list[Path]:
    return sorted(dist.glob("*/*/*.safetensors"))


class Source:
    """A model of one's own with a recipe, and a second one's files to put in the place of its own."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder = Path(shutil.copytree(shared, folder / "model"))
        (self.folder / "LICENSE").write_text("free\n")
        self.recipe = write_recipe(folder / "recipe.yaml", self.folder, WAYS, samples=4, compute_dtype="float32")
        self.dist = folder / "dist"

    def build(self) -> Any:
        return run_in_process("build", self.recipe, "--dist", self.dist, *CPU)


@pytest.fixture
def source(tmp_path: Path, tiny_llama: Path) -> Source:
    return Source(tmp_path, tiny_llama)


@pytest.fixture
def at_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """``at_block(2, act)``: do something once, when a build has finished two blocks."""
    real = CalibrationPass._keep

    def plan(block: int, act: Callable[[], object]) -> None:
        def keep(self: CalibrationPass, next_block: int, *rest: Any) -> None:
            real(self, next_block, *rest)
            if next_block == block:
                monkeypatch.setattr(CalibrationPass, "_keep", real)
                act()

        monkeypatch.setattr(CalibrationPass, "_keep", keep)

    return plan


# -- the source


def test_weights_replaced_in_the_middle_of_a_build_are_an_error(source: Source, at_block: Any, tmp_path: Path) -> None:
    weights = source.folder / "model.safetensors"
    old = weights.read_bytes()
    at_block(1, lambda: last_weight(weights))
    refused = source.build()
    assert_refused(refused, "model.safetensors", "model.layers.2.mlp.down_proj.weight", "changed after")
    assert published(source.dist) == []
    weights.write_bytes(old)  # as the message says: what was made of it is sound
    again = source.build()
    assert again.returncode == 0, again.stderr
    assert "going on after block 2 of 3" in again.stderr
    whole = Source(tmp_path / "whole", source.folder)
    assert whole.build().returncode == 0
    assert {name: value for name, value in contents(source.dist).items() if name.endswith(".safetensors")} == {
        name: value for name, value in contents(whole.dist).items() if name.endswith(".safetensors")
    }


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "config.json", "LICENSE"])
def test_a_small_file_replaced_in_the_middle_of_a_build_is_an_error(source: Source, at_block: Any, name: str) -> None:
    file = source.folder / name
    at_block(3, lambda: file.write_bytes(file.read_bytes() + b"\n"))
    assert_refused(source.build(), name, "changed after")
    assert published(source.dist) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_what_is_read_first_is_as_it_was_hashed(source: Source, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = resumable_pass.load_tokenizer

    def replaced(*arguments: Any) -> Any:
        file = source.folder / name
        file.write_bytes(file.read_bytes() + b"\n")
        return real(*arguments)

    monkeypatch.setattr(resumable_pass, "load_tokenizer", replaced)
    assert_refused(source.build(), name, "changed after")


def test_a_text_replaced_after_it_was_hashed_is_an_error(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("An old line of text that says nothing.\n" * 400)
    data = source.recipe.read_text()
    source.recipe.write_text(data.replace("dataset: pydoc", f"dataset: [{{file: {text}}}]"))
    assert str(text) in source.recipe.read_text()
    real = resumable_pass.load_tokenizer

    def replaced(*arguments: Any) -> Any:
        text.write_text("A new line of text that says nothing!\n" * 400)
        return real(*arguments)

    monkeypatch.setattr(resumable_pass, "load_tokenizer", replaced)
    assert_refused(source.build(), "text.txt", "changed after")


def replaced_unseen(source: Source, other: Path) -> None:
    """What ``cp -p`` and ``rsync -t`` do: another file of equal size and modification time."""
    weights = source.folder / "model.safetensors"
    before = weights.stat()
    assert other.stat().st_size == before.st_size
    with weights.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def other(source: Source, tmp_path: Path) -> Path:
    """Other weights, of the same size."""
    path = Path(shutil.copy(source.folder / "model.safetensors", tmp_path / "other.safetensors"))
    last_weight(path)
    return path


def test_a_replacement_of_equal_size_and_time_is_stale(source: Source, other: Path) -> None:
    assert source.build().returncode == 0
    before = contents(source.dist)
    replaced_unseen(source, other)
    planned = run_in_process("plan", source.recipe, "--dist", source.dist)
    assert "nothing to build" not in planned.stdout + planned.stderr
    assert source.build().returncode == 0
    after = contents(source.dist)
    assert {name for name in before if "manifest" in name and before[name] == after[name]} == set()


def test_a_replacement_that_the_disk_does_not_tell_is_noticed_when_it_is_read(
    source: Source, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "identity_of", lambda real: f"{real}\0{real.stat().st_size}\0{real.stat().st_mtime_ns}")
    only = ("--only", "awq/main", *CPU)
    assert run_in_process("build", source.recipe, "--dist", source.dist, *only).returncode == 0  # remembers the hash
    shutil.rmtree(source.dist)
    replaced_unseen(source, other)
    assert_refused(source.build(), "model.layers.2.mlp.down_proj.weight", "changed after")
    assert published(source.dist) == []
    assert source.build().returncode == 0  # a release of the new file
    (manifest,) = {path.read_text() for path in source.dist.glob("*GPTQ/main/quantize-manifest.json")}
    assert json.loads(manifest)["source"]["files"]["model.safetensors"] == digest.sha256_of_file(other)


# -- what is unfinished


@pytest.fixture(scope="module")
def unfinished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A build that met a full disk in its third block."""
    made = Source(tmp_path_factory.mktemp("unfinished"), tiny_llama)
    real = CalibrationPass._keep

    def full(self: CalibrationPass, next_block: int, *rest: Any) -> None:
        if next_block == 3:
            raise OSError(28, "No space left on device")
        real(self, next_block, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CalibrationPass, "_keep", full)
        assert_refused(made.build(), "no space left", code=1)
    return made


def written_tensor(folder: Path) -> None:
    from quantize.formats.safetensors_header import file_header

    path = folder / "branches" / "gptq" / "main" / "model.safetensors"
    flip(path, file_header(path).places["model.layers.1.mlp.up_proj.qweight"][0] + 5)


def record(line: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "blocks.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        flip(path, sum(map(len, lines[:line])) + len(lines[line]) // 2)

    return change


def states(stream: int) -> Callable[[Path], None]:
    return lambda folder: flip(folder / f"states-0-{stream}.0")  # those that enter block 2


DAMAGES = {
    "tensor": (written_tensor, "model.layers.1.mlp.up_proj.qweight"),
    "states": (states(0), "states-0-0.0"),
    "states of a drifting branch": (states(1), "states-0-1.0"),
    "record": (record(1), "line 2 of blocks.jsonl"),
    "state file gone": (lambda folder: (folder / "states-0-0.0").unlink(), "states-0-0.0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_byte_is_one_sentence_on_resume(unfinished: Source, tmp_path: Path, damage: str) -> None:
    dist = Path(shutil.copytree(unfinished.dist, tmp_path / "dist"))
    (folder,) = (dist / ".quantize" / "unfinished").iterdir()
    change, word = DAMAGES[damage]
    change(folder)
    refused = run_in_process("build", unfinished.recipe, "--dist", dist, *CPU)
    assert_refused(refused, word, "this unfinished build is damaged", "quantize clean", code=1)
    assert "are kept" not in refused.stderr
    assert published(dist) == []
    assert run_in_process("clean", "--dist", dist, "--yes").returncode == 0
    assert not folder.exists()


def test_a_torn_line_is_a_block_that_was_not_finished(unfinished: Source, tmp_path: Path) -> None:
    dist = Path(shutil.copytree(unfinished.dist, tmp_path / "dist"))
    (folder,) = (dist / ".quantize" / "unfinished").iterdir()
    with (folder / "blocks.jsonl").open("ab") as file:
        file.write(b'0123 {"next_block":3')
    again = run_in_process("build", unfinished.recipe, "--dist", dist, *CPU)
    assert again.returncode == 0, again.stderr
    assert "going on after block 2 of 3" in again.stderr


def test_a_damaged_importance_matrix_is_noticed(tmp_path: Path) -> None:
    import numpy as np

    from quantize.dist.records import BLOCKS, Records
    from quantize.dist.resume import Block, State, find_unfinished
    from quantize.errors import DamagedBuild

    wish = State({"statistics": "gathered"}, {}, True, 3)
    folder = tmp_path / ".quantize" / "unfinished" / wish.key
    folder.mkdir(parents=True)
    Unfinished(folder, wish, Records(folder / BLOCKS)).keep(Block(1), {"a": (np.ones(64, np.float32), 7)})
    (found,) = find_unfinished(tmp_path)
    assert found.diagonals()["a"][1] == 7
    flip(folder / "imatrix-00001.npz")
    with pytest.raises(DamagedBuild, match=r"imatrix-00001\.npz is not what was written"):
        found.diagonals()


def test_a_byte_that_changes_before_a_branch_is_published_is_noticed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resumable_pass.Pass.complete

    def damaged(self: resumable_pass.Pass, branch: Any) -> Any:
        if branch.item.label == "awq/main":
            flip(branch.folder / "model.safetensors")
        return real(self, branch)

    monkeypatch.setattr(resumable_pass.Pass, "complete", damaged)
    assert_refused(source.build(), "model.safetensors is not what was written", "quantize clean", code=1)
    assert published(source.dist) == []


def test_what_a_block_costs_does_not_grow_with_the_blocks_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Source(tmp_path, write_model(tmp_path / "deep", num_hidden_layers=10))
    costs: list[int] = []
    real_keep, real_pwrite, real_replace = Unfinished.keep, os.pwrite, os.replace

    def pwrite(file: int, data: Any, offset: int) -> int:
        costs[-1:] = [costs[-1] + len(data)] if costs else []
        return real_pwrite(file, data, offset)

    def replace(old: Any, new: Any) -> None:
        costs[-1:] = [costs[-1] + Path(old).stat().st_size] if costs else []
        real_replace(old, new)

    def keep(self: Unfinished, *rest: Any) -> None:
        costs.append(0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", pwrite)
            patched.setattr(os, "replace", replace)
            real_keep(self, *rest)

    monkeypatch.setattr(Unfinished, "keep", keep)
    assert deep.build().returncode == 0
    assert len(costs) == 10
    assert 0 < max(costs[2:]) < 1.05 * costs[1]


# -- what is kept in the cache


def test_damaged_statistics_are_noticed(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    with_statistics = ("--keep-statistics", "--only", "gptq/main", *CPU)
    kept = run_in_process("build", source.recipe, "--dist", source.dist, *with_statistics)
    assert kept.returncode == 0, kept.stderr
    (folder,) = (tmp_path / "cache" / "statistics").iterdir()
    for name in ("00001.safetensors", "00001.table"):
        good = (folder / name).read_bytes()
        flip(folder / name)
        shutil.rmtree(source.dist)
        refused = run_in_process("build", source.recipe, "--dist", source.dist, "--only", "awq/main", *CPU)
        assert_refused(refused, "00001", "saved statistics", "quantize gc")
        (folder / name).write_bytes(good)


def test_damaged_states_of_a_measurement_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from quantize.measuring.store import Store

    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path))
    Store("source", "all").keep_source({"source": torch.ones(2, 8, 16)})
    assert Store("source", "all").has_source
    (file,) = (tmp_path / "measure").iterdir()
    flip(file, file.stat().st_size - 5)
    assert not Store("source", "all").has_source
