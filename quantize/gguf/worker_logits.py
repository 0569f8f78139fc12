"""Child process: compute logits of a GGUF model for token ids, and llama.cpp's token ids of a text.

Keys of the arguments: ``model`` (a file), ``ids`` (a ``.npy``, int64 [length]), ``logits`` (the ``.npy`` to write,
float32 [length, vocabulary]), ``threads``, ``text``.
"""

from __future__ import annotations

from typing import Any


def run(arguments: dict[str, Any]) -> list[int]:
    import numpy as np
    from llama_cpp import Llama

    ids = np.load(arguments["ids"]).tolist()
    llama = Llama(
        model_path=arguments["model"], n_ctx=len(ids) + 8, n_batch=len(ids) + 8, n_threads=arguments["threads"],
        n_gpu_layers=0, logits_all=True, verbose=False,
    )  # fmt: skip
    tokens = llama.tokenize(arguments["text"].encode(), add_bos=False, special=False)
    llama.eval(ids)
    np.save(arguments["logits"], np.array(llama.scores[: len(ids)], dtype=np.float32))
    return list(tokens)
