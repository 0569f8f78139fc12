"""Child process: transformers loads a branch and writes greedily; ``FOLDER PROMPT TOKENS``. Answers in JSON."""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, prompt, count = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map=device, trust_remote_code=False, use_safetensors=True
    )
    quantized = ("qweight", "weight_packed")
    if not any(name.endswith(quantized) for name, _ in [*model.named_buffers(), *model.named_parameters()]):
        raise SystemExit("loaded, but not as a quantized model")
    answer(model, tokenizer, prompt, int(count), device)


def answer(model: Any, tokenizer: Any, prompt: str, count: int, device: str) -> None:
    """Print what a loaded model writes greedily after a prompt."""
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    written = model.generate(
        **ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, repetition_penalty=1.0
    )[0].tolist()
    start = ids["input_ids"].shape[1]
    print(json.dumps({"ids": written, "prompt": start, "text": tokenizer.decode(written[start:])}))


if __name__ == "__main__":
    main()
