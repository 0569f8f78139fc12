"""Child process: gptqmodel loads a branch and writes greedily; ``FOLDER PROMPT TOKENS``. Answers in JSON."""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    import torch
    from gptqmodel import GPTQModel
    from transformers import AutoTokenizer

    from quantize.verifying.worker_transformers import answer

    folder, prompt, count = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = GPTQModel.load(folder, device=device).model
    answer(model, tokenizer, prompt, int(count), device)


if __name__ == "__main__":
    main()
