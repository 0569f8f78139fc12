"""Models of real shapes with random weights, written a block at a time, and a text to calibrate them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def write_model(folder: Path, shape: dict[str, Any], length: int, device: str = "cpu") -> Path:
    """A random Llama, a file for each block, never whole in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import VOCABULARY, tokenizer

    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": length, "tie_word_embeddings": False, **shape}
    config = AutoConfig.for_model("llama", bos_token_id=1, eos_token_id=2, **sizes)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(empty).__name__], "bfloat16"
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    files: dict[str, list[str]] = {}
    for name in empty.state_dict():
        part = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    random = torch.Generator(device).manual_seed(0)
    for file, names in files.items():
        tensors = {}
        for name in names:
            like = empty.state_dict()[name]
            drawn = torch.randn(like.shape, generator=random, device=device, dtype=torch.float32) * 0.02
            tensors[name] = (drawn if like.dim() > 1 else torch.ones_like(drawn)).to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def text() -> str:
    """The Python language reference."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))
