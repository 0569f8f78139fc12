"""Child process: what llama.cpp makes of a GGUF. Its log goes to stderr, where the reason of a failure stands.

Keys of the arguments: ``model`` (a file), ``threads``; for a header, whose tensors hold no data, nothing else: the
answer says whether llama.cpp can load such a file. For logits ``ids`` (a ``.npy``, int64 [length]), ``picks`` (places
in it, ascending; absent: all), ``logits`` (the ``.npy`` to write, float32 [picks, vocabulary]) and ``text``, whose
token ids are the answer.
"""

from __future__ import annotations

import ctypes
from typing import Any

BATCH = 512
"""Tokens that llama.cpp computes at a time."""


def run(arguments: dict[str, Any]) -> Any:
    return _logits(arguments) if "ids" in arguments else _loads(arguments)


def _loads(arguments: dict[str, Any]) -> bool:
    """Have llama.cpp read the header and create all tensors, without their data."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, llama_cpp.LLAMA_LOAD_MODE_NONE, 0
    _be_loud()
    model = llama_cpp.llama_model_load_from_file(arguments["model"].encode(), params)
    if not model:
        raise RuntimeError("llama.cpp cannot load it")
    llama_cpp.llama_model_free(model)
    return True


def _logits(arguments: dict[str, Any]) -> list[int]:
    import llama_cpp
    import numpy as np
    from llama_cpp import Llama

    ids = np.load(arguments["ids"]).tolist()
    picks = set(arguments.get("picks") or range(len(ids)))
    _be_loud()
    llama = Llama(
        model_path=arguments["model"], n_ctx=len(ids) + 8, n_batch=BATCH, n_threads=arguments["threads"],
        n_gpu_layers=0, verbose=True,
    )  # fmt: skip
    tokens = llama.tokenize(arguments["text"].encode(), add_bos=False, special=False)
    found = []
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
    context, width = llama._ctx.ctx, llama.n_vocab()
    for start in range(0, len(ids), BATCH):
        part = ids[start : start + BATCH]
        batch.n_tokens = len(part)
        for place, token in enumerate(part):
            batch.token[place], batch.pos[place] = token, start + place
            batch.seq_id[place][0], batch.n_seq_id[place] = 0, 1
            batch.logits[place] = start + place in picks
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp cannot compute with it (llama_decode returned {code})")
        for place in range(len(part)):
            if start + place in picks:
                row = llama_cpp.llama_get_logits_ith(context, place)
                found.append(np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (width,)).copy())
    llama_cpp.llama_batch_free(batch)
    np.save(arguments["logits"], np.stack(found).astype(np.float32))
    return list(tokens)


def _be_loud() -> None:
    from llama_cpp._logger import set_verbose

    set_verbose(True)
