"""Whether two calls of a block are the same: whatever may depend on the tokens is compared by value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from transformers.models.llama import modeling_llama

from quantize.recipe.schema import Model
from quantize.source.calls import HandedOn, HiddenLayout, equal_calls
from quantize.source.resolve import resolve
from quantize.source.streamed import StreamedModel


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (3, 3, True), (3, 4, False), (3, 3.0, False), (True, False, False), ("causal", "full", False), (None, 0, False),
        (float("nan"), float("nan"), True), (torch.float32, torch.float32, True), (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(3), False), (torch.ones(2), torch.ones(2, dtype=torch.int64), False),
        ({"a": [1, (2, "b")]}, {"a": [1, (2, "b")]}, True), ({"a": [1, (2, "b")]}, {"a": [1, (2, "c")]}, False),
        (np.arange(3), np.arange(3), True), (np.arange(3), np.arange(4), False),
        (range(3), range(3), True), (range(3), range(4), False),
        (HiddenLayout(0, 1), HiddenLayout(0, 1), True), (HiddenLayout(0, 1), HiddenLayout(1, 0), False),
        (HandedOn({"a": {0: torch.ones(2)}}), HandedOn({"a": {0: torch.ones(2)}}), True),
        (HandedOn({"a": {0: torch.ones(2)}}), HandedOn({"a": {0: torch.zeros(2)}}), False),
        (partial(max, 1), partial(max, 1), True), (partial(max, 1), partial(max, 2), False),
        (object(), object(), False),
    ],
)  # fmt: skip
def test_calls_are_compared_by_value(left: Any, right: Any, equal: bool) -> None:
    assert equal_calls(left, right) is equal
    assert equal_calls({"mask": [left]}, {"mask": [right]}) is equal


def test_functions_are_compared_by_what_they_hold() -> None:
    def masks(window: int) -> Callable[[int], bool]:
        return lambda place: place < window

    assert equal_calls(masks(3), masks(3))
    assert not equal_calls(masks(3), masks(4))
    assert equal_calls(HiddenLayout().pack, HiddenLayout().pack)


def test_a_number_that_depends_on_the_tokens_is_that_of_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a Llama that scale their output by the largest token, which the model hands them as a number."""
    whole, layer = modeling_llama.LlamaModel.forward, modeling_llama.LlamaDecoderLayer.forward

    def counting(self: Any, input_ids: torch.Tensor, **keywords: Any) -> Any:
        return whole(self, input_ids, largest=int(input_ids.max()), **keywords)

    def scaling(self: Any, hidden_states: torch.Tensor, largest: int, **keywords: Any) -> torch.Tensor:
        return layer(self, hidden_states, **keywords) * (1 + largest / 100)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", counting)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", scaling)
    source = resolve(Model(source=str(write_model(tmp_path / "model"))), weights=True)
    model = StreamedModel(source, torch.float32, torch.device("cpu"), head=True)
    windows = [torch.tensor([[5, 6, 7]]), torch.tensor([[50, 60, 70]])]
    states = [model.embed(ids) for ids in windows]
    for index in range(len(model)):
        with model.block(index) as block:
            states = [model.run(index, block, hidden, ids) for hidden, ids in zip(states, windows, strict=True)]
    plain = type(model.model).from_pretrained(source.folder, dtype=torch.float32).eval()
    for ids, hidden in zip(windows, states, strict=True):
        with torch.no_grad():
            wanted = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model.logits(ids, hidden), wanted, rtol=1e-4, atol=1e-4)
