"""Small real models of every architecture, written as Hugging Face checkpoints with a real tokenizer."""

from __future__ import annotations

import functools
import io
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

VOCABULARY = 384
WIDTH = 128
SENTENCEPIECE_TOKENS = 512

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": WIDTH},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
    "stablelm": {},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt2": {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 256},
}


SMALL = """\
model: {{source: {source}, name: Small, creator: Nobody, license: apache-2.0}}
release: {{owner: me}}
"""
"""How recipes of ``small_llama`` begin, so that they share one conversion to GGUF, which depends on this."""

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "pad_token_id": 0},
}
"""Mixtures of experts, of which two see each token."""
EVERY_WAY = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: drifting, bits: 4, group_size: 64, desc_act: true, propagate: quantized}
awq:
  variants:
    - {branch: main, bits: 4, group_size: 32}
"""
"""Branches that go every way through a pass: shared statistics, a stream of its own, AWQ."""


def write_model(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """A randomly initialised model of three blocks, saved with its tokenizer; always the same weights."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if architecture in MIXTURES:
        common |= {"num_experts_per_tok": 2, "decoder_sparse_step": 1, "intermediate_size": 96}
    own = ARCHITECTURES.get(architecture) or MIXTURES.get(architecture, {})
    config = AutoConfig.for_model(architecture, **{**common, **own, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 3):  # three: stacked experts
                parameter.normal_(0, 0.06)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("A licence that has to travel with the model.\n")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\ntags:\n- tiny\n---\n\n# A tiny model\n\nIts own card.\n"
    )
    return folder


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the Python language reference."""
    from pydoc_data.topics import topics

    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([topics[key] for key in sorted(topics)[:20]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def write_recipe(path: Path, source: Path, body: str = "", **calibration: Any) -> Path:
    """A recipe for a tiny model; ``body`` is the ``gptq`` section's YAML, indented by two blanks."""
    settings = {"dataset": "pydoc", "samples": 8, "sequence_length": 64, **calibration}
    lines = [f"model: {{source: {source}, name: Tiny, creator: Nobody}}", "calibration:"]
    lines += [f"  {key}: {value}" for key, value in settings.items()]
    lines += ["gptq:", body or "  variants:\n    - {bits: 4, group_size: 32}\n"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def wide_model(folder: Path, tokenizer_folder: Path, **changes: Any) -> Path:
    """A random Llama of 256-wide rows, which llama.cpp's levels need, with a tokenizer that it knows."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 49152}
    write_model(folder, dtype=torch.float16, **{**sizes, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        if (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, folder / name)
    return folder


def small_wide_model(folder: Path, **changes: Any) -> Path:
    """As :func:`wide_model`, with a SentencePiece tokenizer of 512 tokens, trained here.

    llama.cpp reads such a tokenizer from its file, where one of BPE has to be known to it; the 49,152 tokens of the one
    that :func:`wide_model` takes are most of that model's bytes, and of its time.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": SENTENCEPIECE_TOKENS}
    write_model(folder, **{**sizes, **changes})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def sentencepiece_model() -> bytes:
    """A SentencePiece BPE model with byte fallback, trained on the Python language reference."""
    from pydoc_data.topics import topics

    import sentencepiece

    lines = [line for key in sorted(topics)[:20] for line in topics[key].splitlines() if line.strip()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=SENTENCEPIECE_TOKENS, model_type="bpe",
        byte_fallback=True, character_coverage=0.999, num_threads=1, minloglevel=2, unk_id=0, bos_id=1, eos_id=2,
    )  # fmt: skip
    return written.getvalue()
