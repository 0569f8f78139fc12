"""Tensors read by plain reads are those that the safetensors library reads, and damage is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.source.tensor_file import TensorFile

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
    with pytest.raises(ValueError, match="ends too early"):
        file.read(last)


def test_a_tensor_that_is_not_there(path: Path) -> None:
    with pytest.raises(KeyError):
        TensorFile(path).read("absent")


def load_names(path: Path) -> list[str]:
    """Names in the order of their bytes."""
    import json

    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    filled = {name: entry["data_offsets"] for name, entry in header.items() if entry["data_offsets"][1]}
    return sorted(filled, key=lambda name: filled[name][1])
