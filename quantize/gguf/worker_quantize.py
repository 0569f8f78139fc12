"""Child process: one call of ``llama_model_quantize``.

A crash or abort of the library ends this process and not the build. Keys of the arguments: ``source``,
``target``, ``ftype``, ``threads``, ``buffer_bytes``, ``dry_run``, and optionally ``output_type``, ``embedding_type``
(numbers of ``ggml_type``), ``tensor_types`` (pairs of regex and number), ``imatrix`` (a ``.npz`` of vectors by tensor
name), ``metadata`` (strings and integers). llama.cpp's log goes to stderr.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def run(request: dict[str, Any]) -> None:
    import llama_cpp
    import numpy as np

    log = sys.stderr.buffer

    def write(level: int, text: bytes, user_data: Any) -> None:
        log.write(text)
        log.flush()

    callback = llama_cpp.llama_log_callback(write)  # has to outlive the calls below
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = request["ftype"]
    params.nthread = request["threads"]
    params.dry_run = request["dry_run"]
    params.max_buf_size = request["buffer_bytes"]
    if request.get("output_type") is not None:
        params.output_tensor_type = request["output_type"]
    if request.get("embedding_type") is not None:
        params.token_embedding_type = request["embedding_type"]
    alive: list[Any] = []  # ctypes holds no reference to a pointer's target
    if request.get("tensor_types"):
        overrides: Any = (llama_cpp.llama_model_tensor_override * (len(request["tensor_types"]) + 1))()
        for place, (pattern, kind) in enumerate(request["tensor_types"]):
            overrides[place].pattern, overrides[place].type = pattern.encode(), kind
        params.tt_overrides = overrides
        alive.append(overrides)
    if request.get("imatrix"):
        # a dry run only needs to know that there is one
        vectors = {"any": np.ones(1)} if request["imatrix"] == "any" else np.load(request["imatrix"])
        names = sorted(vectors)
        entries: Any = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
        for place, name in enumerate(names):
            values = np.ascontiguousarray(vectors[name], dtype=np.float32)
            alive.append(values)
            entries[place].name = name.encode()
            entries[place].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries[place].size = values.size
        params.imatrix = entries
        alive.append(entries)
    if request.get("metadata"):
        keys: Any = (llama_cpp.llama_model_kv_override * (len(request["metadata"]) + 1))()
        for place, (key, value) in enumerate(request["metadata"].items()):
            keys[place].key = key.encode()
            if isinstance(value, int):
                keys[place].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
                keys[place].value.val_i64 = value
            else:
                keys[place].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
                keys[place].value.val_str = str(value).encode()[:127]
        params.kv_overrides = keys
        alive.append(keys)
    failed = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError("llama.cpp failed to quantize")
