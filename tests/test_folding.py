"""What can absorb an AWQ scale: found in blocks made for it, and in branches of post-norm models in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model, write_recipe
from torch import nn
from transformers import AutoModelForCausalLM

import quantize
from quantize.calibration.folding import Fold, find_folds
from quantize.calibration.kinds import kind_of
from quantize.calibration.statistics import Collector
from quantize.formats.reader import BranchReader
from quantize.source.linear import Linear

WIDTH = 32


class _Alone:
    """A block that is no part of a model, with the methods of a streamed one that a search needs."""

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = block(hidden)
        return output


def folds_of(block: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Fold | None]:
    block = block.to(dtype).requires_grad_(requires_grad=False)
    hidden = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    linears = [Linear(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    watch = Collector([linear for linear in linears if linear.local != "router"])
    with torch.inference_mode(), watch.attached():
        block(hidden)
        watch.finish()
    before = {name: (parameter, parameter.clone()) for name, parameter in block.named_parameters()}
    found = find_folds(_Alone(), 0, block, watch.groups, hidden=hidden)  # type: ignore[arg-type]
    for name, parameter in block.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    return found


def producers(block: nn.Module) -> dict[str, str | None]:
    return {leader: fold.producer if fold else None for leader, fold in folds_of(block).items()}


class Mlp(nn.Module):
    """``hidden + post(down(act(gate(norm(hidden))) * up(norm(hidden))))``; ``gated`` without the product."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], gated: bool = True, size: float = 1.0) -> None:
        super().__init__()
        self.norm, self.post = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.down = nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 64, bias=False) if gated else None
        self.act = act
        with torch.no_grad():
            self.gate.weight.mul_(size)
            self.post.weight.mul_(1e-3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        product = self.act(self.gate(inner))
        if self.up is not None:
            product = product * self.up(inner)
        output: torch.Tensor = hidden + self.post(self.down(product))
        return output


@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
@pytest.mark.parametrize(
    "act", [nn.functional.silu, nn.functional.gelu, torch.tanh, torch.sigmoid, lambda x: torch.relu(x) ** 2]
)
def test_nothing_behind_a_nonlinearity_takes_a_scale(act: Any, size: float) -> None:
    """Not even where the real weights are so small that it looks linear, or zero, and a post-norm hides the rest."""
    assert producers(Mlp(act, gated=False, size=size)) == {"gate": "norm", "down": None}
    assert producers(Mlp(act, size=size)) == {"gate": "norm", "down": "up"}


def test_a_relu_lets_scales_through() -> None:
    assert producers(Mlp(torch.relu, gated=False)) == {"gate": "norm", "down": "gate"}


class Readers(nn.Module):
    """A norm whose output is read by a linear, and by whatever ``other`` is."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.other = nn.Linear(WIDTH, 4, bias=False), other
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        output: torch.Tensor = torch.tanh(self.proj(inner))
        if self.other == "router":
            best = self.router(inner).argmax(-1)
            return hidden + output * (best > 3).to(output.dtype)[..., None]
        if self.other == "residual":
            return inner + output
        if self.other == "function":
            return hidden + output + 1e-3 * torch.tanh(nn.functional.linear(inner, self.table))
        return hidden + output


@pytest.mark.parametrize("other", ["router", "residual", "function", "nothing"])
def test_a_norm_takes_a_scale_only_if_nothing_else_reads_it(other: str) -> None:
    assert producers(Readers(other)) == {"proj": "norm" if other == "nothing" else None}


class Attention(nn.Module):
    """Causal attention from one fused projection, laid out as ``layout`` says; ``shared`` heads share values."""

    def __init__(self, layout: str, shared: int) -> None:
        super().__init__()
        self.layout, self.shared, self.pairs = layout, shared, 4 // shared
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (4 + 2 * self.pairs) * 8)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden.shape
        fused = self.qkv(self.norm(hidden))
        if self.layout == "after each other":
            parts = fused.split([32, self.pairs * 8, self.pairs * 8], dim=-1)
            query, key, value = (part.view(batch, length, -1, 8).transpose(1, 2) for part in parts)
        else:
            heads = fused.view(batch, length, self.pairs, self.shared + 2, 8)
            query = heads[..., : self.shared, :].reshape(batch, length, 4, 8).transpose(1, 2)
            key, value = (heads[..., self.shared + part, :].transpose(1, 2) for part in (0, 1))
        key, value = (part.repeat_interleave(self.shared, dim=1) for part in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: torch.Tensor = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("layout", ["after each other", "head by head"])
def test_values_of_a_fused_projection_take_a_scale(layout: str, shared: int) -> None:
    fold = folds_of(Attention(layout, shared))["out"]
    assert fold is not None
    assert fold.producer == "qkv"
    channel = torch.arange(WIDTH)
    pair, place = channel // 8 // shared, channel % 8
    if layout == "after each other":
        expected = (4 + 4 // shared) * 8 + pair * 8 + place
    else:
        expected = pair * (shared + 2) * 8 + (shared + 1) * 8 + place
    assert torch.equal(fold.rows, expected)


class Gated(nn.Module):
    """A norm for each head, gated, whose weight all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.RMSNorm(8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.norm(torch.tanh(self.value(hidden)).unflatten(-1, (4, 8)))
        output: torch.Tensor = hidden + self.out(heads.flatten(-2) * torch.sigmoid(self.gate(hidden)))
        return output


def test_a_norm_that_heads_share_takes_one_scale_for_all() -> None:
    fold = folds_of(Gated())["out"]
    assert fold is not None
    assert fold.producer == "norm"
    assert torch.equal(fold.rows, torch.arange(WIDTH) % 8)


# -- kinds of blocks


class Kind(nn.Module):
    def __init__(self, outputs: int = 8, layer_idx: int = 0, act: Any = torch.relu, **settings: Any) -> None:
        super().__init__()
        self.proj, self.layer_idx, self.act = nn.Linear(4, outputs), layer_idx, act
        for name, value in settings.items():
            setattr(self, name, value)


def test_kinds_of_blocks_compare_shapes_and_settings_but_not_places() -> None:
    assert kind_of(Kind(layer_idx=3, scale=0.5)) == kind_of(Kind(layer_idx=1, scale=0.25))
    different = [
        Kind(), Kind(16), Kind(act=torch.tanh), Kind(heads=4), Kind(heads=2), Kind(is_sliding=True), Kind(window=None),
        Kind(layer_type="full"), Kind(multiplier=0.0), Kind(multiplier=1.0), Kind(sizes=[1, 2]), Kind(sizes=[1, 3]),
    ]  # fmt: skip
    kinds = [kind_of(block) for block in different]
    assert len(set(kinds)) == len(kinds) - 1  # None is no setting


# -- post-norm models in bfloat16


def lifelike(folder: Path, plus_one: int) -> Path:
    """Norms of the sizes of trained models: from dead channels to dozens, and a few strong channels."""
    tensors = load_file(folder / "model.safetensors")
    dice = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if "norm" in name and tensor.dim() == 1:
            values = torch.randn(tensor.shape, generator=dice).exp() * (
                0.3 if name.endswith(("q_norm.weight", "k_norm.weight")) else 2
            )
            values[::17], values[5] = values[::17] * 10, 0
            tensor.copy_(values - plus_one)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


POST_NORM: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma2": (1, {}),
    "gemma3_text": (1, {}),
    "olmo2": (0, {}),
    "glm4": (0, {"head_dim": 32, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
}
BEFORE = {
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm", "o_proj": "v_proj",
    "gate_proj": "pre_feedforward_layernorm", "up_proj": "pre_feedforward_layernorm", "down_proj": "up_proj",
    "gate_up_proj": "post_attention_layernorm",
}  # fmt: skip
BODY = "  variants: [{group_size: 32}]\nawq:\n  variants: [{group_size: 32}]\n"


@torch.no_grad()
def logits(model: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    reader, stored = BranchReader(folder), load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        parameter.copy_(reader.weight(module) if f"{module}.qweight" in stored else stored[name].float())
    found: torch.Tensor = model(ids).logits.log_softmax(-1)
    return found


@pytest.mark.parametrize("architecture", POST_NORM)
def test_post_norm_models_in_bfloat16_are_scaled_by_what_can_take_it(tmp_path: Path, architecture: str) -> None:
    plus_one, settings = POST_NORM[architecture]
    folder = write_model(tmp_path / "m", architecture, dtype=torch.bfloat16, num_hidden_layers=2, **settings)
    lifelike(folder, plus_one)
    recipe = quantize.load_recipe(write_recipe(tmp_path / "r.yaml", folder, BODY, compute_dtype="bfloat16"))
    quantize.build(recipe, quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    awq, gptq = (tmp_path / "dist" / f"m-{method}" / "main" for method in ("AWQ", "GPTQ"))
    for row in json.loads((awq / "quantize-manifest.json").read_text())["ledger"]:
        leaf = row["module"].rpartition(".")[2]
        expected = BEFORE[leaf]
        if architecture == "glm4" and leaf == "down_proj":
            expected = "gate_up_proj"
        if architecture == "olmo2" and expected.endswith("norm"):
            assert row["outcome"] == "unscaled"
        else:
            assert row["scale_folded_into"].rpartition(".")[2] == expected
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, 380, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        source = model(ids).logits.log_softmax(-1)
    scaled, plain = (float((source.exp() * (source - logits(model, at, ids))).sum(-1).mean()) for at in (awq, gptq))
    assert scaled < 1.5 * plain
