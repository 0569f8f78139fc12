"""The streamed model equals the whole one, and its statistics are those of the whole model's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, write_model
from transformers import AutoModelForCausalLM

from quantize.calibration.forward import Activations, block_statistics
from quantize.errors import CalibrationError, SourceError
from quantize.recipe.schema import Model
from quantize.source import resolve
from quantize.source.streamed import StreamedModel

CPU = torch.device("cpu")


def streamed(folder: Path, dtype: torch.dtype = torch.float32, head: bool = True) -> StreamedModel:
    source = resolve(Model(source=str(folder)), weights=True)
    return StreamedModel(source, dtype, CPU, head=head)


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def token_ids(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 380, (rows, length), generator=torch.Generator().manual_seed(3))


def streamed_logits(model: StreamedModel, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    for index in range(len(model)):
        with model.block(index) as block:
            hidden = model.run(index, block, hidden)
    return model.logits(ids, hidden)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("streaming") / "tiny")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_logits_equal_the_whole_models(tmp_path: Path, architecture: str) -> None:
    folder = write_model(tmp_path / "tiny", architecture)
    ids = token_ids()
    with torch.no_grad():
        expected = whole(folder)(ids).logits
    found = streamed_logits(streamed(folder), ids)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sources_of_every_dtype_are_streamed_alike(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_model(tmp_path / "tiny", dtype=dtype)
    ids = token_ids()
    with torch.no_grad():
        expected = whole(folder)(ids).logits
    assert torch.allclose(streamed_logits(streamed(folder), ids), expected, rtol=0, atol=1e-4)


def test_tied_embeddings_serve_as_the_head(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", tie_word_embeddings=True)
    ids = token_ids()
    with torch.no_grad():
        expected = whole(folder)(ids).logits
    assert torch.allclose(streamed_logits(streamed(folder), ids), expected, rtol=0, atol=1e-4)


def test_bfloat16_is_close_to_float32(llama: Path) -> None:
    ids = token_ids()
    wide, narrow = (streamed_logits(streamed(llama, dtype), ids) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert float((wide - narrow.float()).norm() / wide.norm()) < 0.02


def test_weights_are_in_memory_only_while_their_block_is_in_use(llama: Path) -> None:
    model = streamed(llama)

    def loaded() -> list[bool]:
        return [any(not parameter.is_meta for parameter in block.parameters()) for block in model.blocks]

    streamed_logits(model, token_ids())
    assert loaded() == [False, False, False]
    with model.block(1) as block:
        assert loaded() == [False, True, False]
        assert not any(parameter.is_meta for parameter in block.parameters())
    assert loaded() == [False, False, False]


def test_weights_are_dropped_when_the_work_on_a_block_fails(llama: Path) -> None:
    model = streamed(llama)
    with pytest.raises(RuntimeError, match="on purpose"), model.block(0):
        raise RuntimeError("on purpose")
    assert all(parameter.is_meta for parameter in model.blocks.parameters())


def test_the_head_is_not_read_for_calibration(llama: Path) -> None:
    model = streamed(llama, head=False)
    assert model.model.lm_head.weight.is_meta
    assert not model.model.model.embed_tokens.weight.is_meta


def roll(model: StreamedModel, ids: torch.Tensor, batch: int) -> tuple[torch.Tensor, list[Any]]:
    """Hidden states after the last block, and every block's statistics."""
    activations, statistics = Activations(model, ids.numpy(), batch), []
    for index in range(len(model)):
        with model.block(index) as block:
            statistics.append(block_statistics(index, block, activations)[0])
    return activations.hidden, statistics


def whole_model_inputs(folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear of the whole model reads, as rows."""
    model, seen = whole(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, arguments, name=name: seen.update({name: arguments[0].flatten(0, 1).double()})
            )
    with torch.no_grad():
        model(ids)
    return seen


def test_statistics_are_those_of_the_whole_models_inputs(llama: Path) -> None:
    ids = token_ids(5)
    _, statistics = roll(streamed(llama), ids, batch=2)
    inputs = whole_model_inputs(llama, ids)
    for index, groups in enumerate(statistics):
        names = [[linear.local for linear in group.linears] for group in groups]
        assert names == [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
        for group in groups:
            rows = inputs[f"model.layers.{index}.{group.linears[0].local}"]
            expected = rows.t() @ rows
            assert group.tokens == len(rows) == 5 * 48
            assert group.hessian.dtype == torch.float32
            assert float((group.hessian - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        ("gpt2", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]),
        ("phi3", [["self_attn.o_proj"], ["self_attn.qkv_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]),
        (
            "falcon",  # its attention and its MLP run in parallel on the same input
            [
                ["self_attention.query_key_value", "mlp.dense_h_to_4h"],
                ["self_attention.dense"],
                ["mlp.dense_4h_to_h"],
            ],
        ),
    ],
)
def test_linears_that_read_one_input_share_its_statistics(
    tmp_path: Path, architecture: str, groups: list[list[str]]
) -> None:
    _, statistics = roll(streamed(write_model(tmp_path / "tiny", architecture)), token_ids(), batch=2)
    found = [[linear.local for linear in group.linears] for group in statistics[0]]
    assert sorted(found) == sorted(groups)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_samples_that_do_not_fill_the_last_batch_are_run_all_the_same(tmp_path: Path, architecture: str) -> None:
    folder = write_model(tmp_path / "tiny", architecture)
    ids = token_ids(5)
    together, all_at_once = roll(streamed(folder), ids, batch=5)
    for batch in (1, 2, 3, 4):
        hidden, statistics = roll(streamed(folder), ids, batch)
        assert torch.allclose(hidden, together, rtol=0, atol=1e-4 * float(together.abs().max()))
        for groups, expected in zip(statistics, all_at_once, strict=True):
            for group, right in zip(groups, expected, strict=True):
                assert group.tokens == right.tokens == 5 * 48
                assert float((group.hessian - right.hessian).norm() / right.hessian.norm()) < 1e-4


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
        roll(streamed(folder), token_ids(), batch=2)


def test_an_output_that_overflows_names_its_block(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "tiny", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e7
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((CalibrationError, SourceError), match=r"model\.layers\.1"):
        roll(streamed(folder, torch.float16), token_ids(), batch=2)
