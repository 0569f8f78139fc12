"""Tensors read by plain reads are those that the safetensors library reads, and damage is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.formats.reader import BranchReader
from quantize.formats.tensor_file import TensorFile

TENSORS = {
    **{
        str(dtype): torch.arange(-6, 6).to(dtype).view(3, 4)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)
    },
    "float8": torch.tensor([[0.5, -2.0]]).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
    "one number": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_reads_what_the_library_reads(path: Path, name: str) -> None:
    found, expected = TensorFile(path).read(name), load_file(path)[name]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.float(), expected.float())


def test_a_file_cut_short_after_its_header_was_read(path: Path) -> None:
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 4)
    last = list(load_names(path))[-1]
    with pytest.raises(ValueError, match="is truncated"):
        file.read(last)


def test_a_tensor_that_is_not_there(path: Path) -> None:
    with pytest.raises(KeyError):
        TensorFile(path).read("absent")


def load_names(path: Path) -> list[str]:
    """Names in the order of their bytes."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    filled = {name: entry["data_offsets"] for name, entry in header.items() if entry["data_offsets"][1]}
    return sorted(filled, key=lambda name: filled[name][1])


@pytest.fixture
def branch(tmp_path: Path) -> Path:
    """A folder with just enough of a branch to be read: two shards with one tensor each."""
    for name in ("a", "b"):
        save_file({name: torch.arange(4)}, tmp_path / f"{name}.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "b.safetensors", "d": "d.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_branch_reads_each_header_once_and_keeps_no_file_open(branch: Path) -> None:
    reader = BranchReader(branch)
    assert torch.equal(reader.tensor("b"), torch.arange(4))
    with (branch / "b.safetensors").open("r+b") as file:
        file.write(bytes(16))
    assert torch.equal(reader.tensor("b"), torch.arange(4))
    fds = Path("/proc/self/fd")
    if fds.is_dir():
        assert not [link for link in map(str, fds.iterdir()) if os.path.realpath(link).startswith(str(branch))]


def test_what_a_branch_cannot_give_is_told_with_its_file(branch: Path) -> None:
    reader = BranchReader(branch)
    with pytest.raises(ValueError, match=r"b\.safetensors: contains no tensor c"):
        reader.tensor("c")
    with pytest.raises(OSError, match=r"d\.safetensors"):
        reader.tensor("d")
    (branch / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"a\.safetensors: it is not a safetensors file"):
        reader.tensor("a")
