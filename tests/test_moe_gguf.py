"""Experts in GGUF: sums and counts of each in the importance matrix, and levels read back expert by expert."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_moe import SILENT, routed, silence
from tiny import small_wide_model, wide_model

import quantize
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.gguf.imatrix import read_importance
from quantize.gguf.vectors import OUTPUTS, find_vectors, queries_of
from quantize.measuring.gguf import open_levels

pytestmark = [*needs.LLAMA_CPP, pytest.mark.usefixtures("forked_converter")]
RECIPE = """\
model: {{source: {source}, name: Small}}
calibration: {{dataset: pydoc, samples: 4, sequence_length: 64, compute_dtype: float32}}
gguf: {{levels: [Q4_K_M, F16]}}
"""
SIZES = {"moe_intermediate_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_go_into_a_gguf_and_come_back(
    architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from llama_cpp import Llama

    sizes, folder = {**SIZES, "architecture": architecture}, tmp_path / "small"
    if architecture == "mixtral":
        source = silence(small_wide_model(folder, **sizes))
    else:  # the converter reads no SentencePiece tokenizer of this one
        demo = request.getfixturevalue("tokenizer_folder")
        source = silence(wide_model(folder, demo, tie_word_embeddings=True, **sizes))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(source=source))
    # the build compares the conversion's logits with the streamed source's
    result = quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    plan = result.plan
    assert plan.gguf
    folder = plan.gguf.folder
    assert "Q4_K_M" in json.loads((folder / "quantize-manifest.json").read_text())["levels"]

    text = "Numbers 12345, naïve façade, and\n\n\ttabs."
    tokens = Llama(str(folder / plan.gguf.levels[0].file), vocab_only=True, verbose=False).tokenize(
        text.encode(), False
    )
    assert tokens == load_tokenizer(plan.source)(text, add_special_tokens=False)["input_ids"]

    importance = read_importance(folder / "small-imatrix.gguf")
    ids = sample_tokens(plan.recipe.calibration, load_tokenizer(plan.source)).ids
    (mixture,) = routed(source, torch.from_numpy(ids))
    for place, name in ((0, "ffn_gate_exps"), (0, "ffn_up_exps"), (1, "ffn_down_exps")):
        sums, counts = importance.sums[f"blk.0.{name}.weight"], importance.counts[f"blk.0.{name}.weight"]
        assert sums.shape == (6, 256)
        means = importance.means()[f"blk.0.{name}.weight"].reshape(6, 256)
        for expert in range(6):
            rows = mixture.rows(expert)[place]
            assert counts[expert] == len(rows)
            assert (len(rows) == 0) == (expert in SILENT)
            np.testing.assert_allclose(sums[expert], rows.detach().square().sum(dim=0), rtol=1e-3, atol=1e-9)
        assert np.array_equal(means[list(SILENT)], np.ones((2, 256)))

    tensors = load_file(source / "model.safetensors")
    became = plan.gguf.conversion.header().converted
    files = {level.level: [folder / level.file] for level in plan.gguf.levels}
    readers = open_levels(files, plan.gguf.conversion.path, became, tensors.__getitem__)
    experts = [linear.name for linear in plan.table.linears if ".experts." in linear.name]
    assert len(experts) == 6 * 3
    for name in experts:
        wanted = tensors[f"{name}.weight"].float()
        torch.testing.assert_close(readers["F16"].weight(name), wanted, rtol=2e-3, atol=1e-6)
        error = float((readers["Q4_K_M"].weight(name) - wanted).norm() / wanted.norm())
        assert 0.005 < error < 0.2


def test_vectors_follow_the_order_of_a_stack_and_fit_what_was_split() -> None:
    """A stack lists its experts as the conversion put them together, whatever the files' order: 2 before 10."""
    numbers, width = (0, 1, 2, 10), 8
    experts = [f"m.0.mlp.experts.{number}.up_proj" for number in numbers]
    diagonals = {name: (np.full(width, place, np.float32), place) for place, name in enumerate(experts)}
    diagonals["m.0.self_attn.kv_b_proj"] = np.arange(width, dtype=np.float32), 7
    diagonals["m.0.self_attn.q_proj"] = np.ones(5, np.float32), 7
    # two heads of 4 + 2 queries each
    diagonals[f"m.0.self_attn.q_proj{OUTPUTS}"] = np.arange(12, dtype=np.float32), 7
    made_of = {
        "blk.0.ffn_up_exps.weight": [f"{name}.weight" for name in experts],
        "blk.0.attn_k_b.weight": ["m.0.self_attn.kv_b_proj.weight"],
        "blk.0.attn_v_b.weight": ["m.0.self_attn.kv_b_proj.weight"],
        "blk.0.attn_q.weight": ["m.0.self_attn.q_proj.weight"],
        "blk.0.attn_q.bias": ["m.0.self_attn.q_proj.bias"],
    }
    shapes = {
        "blk.0.ffn_up_exps.weight": (4, 3, width), "blk.0.attn_k_b.weight": (2, width, 4),
        "blk.0.attn_v_b.weight": (2, 3, width), "blk.0.attn_q.weight": (12, 6), "blk.0.attn_q.bias": (12,),
    }  # fmt: skip
    vectors = find_vectors(diagonals, made_of, shapes)
    assert vectors.left_out == ("blk.0.attn_q.weight",)  # of six inputs, the statistics have five
    assert vectors.found.keys() == set(shapes) - {"blk.0.attn_q.weight", "blk.0.attn_q.bias"}
    sums, counts = vectors.found["blk.0.ffn_up_exps.weight"]
    assert sums[:, 0].tolist() == counts.tolist() == [0, 1, 2, 3]
    sums, counts = vectors.found["blk.0.attn_k_b.weight"]
    assert (sums.tolist(), counts.tolist()) == ([[0, 1, 2, 3], [6, 7, 8, 9]], [7, 7])
    sums, _ = vectors.found["blk.0.attn_v_b.weight"]
    assert sums.tolist() == [list(range(width))] * 2
    assert queries_of(made_of, diagonals) == {"m.0.self_attn.q_proj"}
