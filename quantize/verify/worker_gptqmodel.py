"""Child process: gptqmodel loads a branch and writes greedily; ``FOLDER PROMPT TOKENS``. Answers in JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    import torch
    from gptqmodel import GPTQModel
    from transformers import AutoTokenizer

    folder, prompt, count = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = GPTQModel.load(folder, device=device).model
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    written = model.generate(
        **ids, max_new_tokens=int(count), min_new_tokens=int(count), do_sample=False, repetition_penalty=1.0
    )[0].tolist()
    start = ids["input_ids"].shape[1]
    print(json.dumps({"ids": written, "prompt": start, "text": tokenizer.decode(written[start:])}))


if __name__ == "__main__":
    main()
