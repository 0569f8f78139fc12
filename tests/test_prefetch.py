"""Blocks read ahead in the background: the same tensors, errors at the block they belong to, nothing that hangs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny import write_model

from quantize.errors import SourceError
from quantize.recipe.schema import Model
from quantize.source import resolve
from quantize.source.prefetch import Prefetch
from quantize.source.streamed import StreamedModel

CPU = torch.device("cpu")


class Watched(StreamedModel):
    """Notes which thread reads what."""

    def read(self, name: str) -> torch.Tensor:
        self.reads = [*getattr(self, "reads", []), (name, threading.current_thread().name.startswith("prefetch"))]
        return super().read(name)


def watched(folder: Path, dtype: torch.dtype = torch.float32, prefetch: bool | None = True) -> Watched:
    source = resolve(Model(source=str(folder)), weights=True)
    return Watched(source, dtype, CPU, prefetch=prefetch)


def hidden_states(model: StreamedModel) -> list[torch.Tensor]:
    """The output of each block."""
    states = [model.embed(torch.arange(3, 51).view(2, 24))]
    for index in range(len(model)):
        with model.block(index) as block:
            states.append(model.run(index, block, states[-1]))
    return states


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("prefetch") / "tiny")


def test_blocks_read_ahead_are_the_blocks(llama: Path) -> None:
    ahead, plain = watched(llama), watched(llama, prefetch=None)
    assert all(map(torch.equal, hidden_states(ahead), hidden_states(plain)))
    assert not any(background for _, background in plain.reads)
    for name, background in ahead.reads:
        assert background == name.startswith(("model.layers.1.", "model.layers.2.")), name


def test_blocks_out_of_turn_are_read_when_they_are_wanted(llama: Path) -> None:
    ahead, plain = watched(llama), watched(llama, prefetch=False)
    for index in (0, 2, 1, 1, 0):
        with ahead.block(index) as one, plain.block(index) as other:
            for left, right in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(left, right)


def test_an_error_in_the_background_is_that_of_its_block(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, passed = watched(folder), []

    def walk() -> None:
        for index in range(len(model)):
            with model.block(index):
                passed.append(index)

    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
        walk()
    assert passed == [0]
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_nothing_waits_for_what_nobody_wants_any_more() -> None:
    reading, going_on, read = threading.Event(), threading.Event(), []

    def slow(name: str) -> torch.Tensor:
        read.append(name)
        reading.set()
        assert going_on.wait(60)
        return torch.zeros(1)

    prefetch = Prefetch(slow, CPU)
    prefetch.start(1, ["a", "b"])
    assert reading.wait(60)
    prefetch.drop()  # while "a" is being read
    prefetch.start(2, ["c"])
    assert prefetch.take(7) == {}  # the third block was never begun, and the second is given up
    assert not going_on.is_set()
    going_on.set()
    prefetch.start(3, ["d"])
    assert list(prefetch.take(3)) == ["d"]
    assert read == ["a", "d"]


def test_work_that_fails_ends_the_reading(llama: Path) -> None:
    model = watched(llama)
    with pytest.raises(RuntimeError, match="on purpose"), model.block(0):
        raise RuntimeError("on purpose")
    assert all(parameter.is_meta for parameter in model.blocks.parameters())
    with model.block(1) as block:  # what was begun for it is given up, not mixed up
        assert not any(parameter.is_meta for parameter in block.parameters())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_stored_weights_are_exact_whatever_the_forward_computes_in(tmp_path: Path, stored: torch.dtype) -> None:
    model = watched(write_model(tmp_path / "tiny", dtype=stored), torch.bfloat16, prefetch=False)
    with model.block(0) as block:
        for linear in model.linears(block):
            name = f"{model.checkpoint_name(0, linear.local)}.weight"
            assert torch.equal(model.stored_weight(0, linear), model.read(name).float())
