"""Child process: logits of a GGUF model on token ids; ``MODEL.gguf IDS.npy LOGITS.npy THREADS TEXT``.

IDS is int64 [length]; LOGITS becomes float32 [length, vocabulary]. Prints, as JSON, the ids that llama.cpp makes
of TEXT.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import numpy as np
    from llama_cpp import Llama

    model, ids_file, out, threads, text = sys.argv[1:]
    ids = np.load(ids_file).tolist()
    llama = Llama(
        model_path=model, n_ctx=len(ids) + 8, n_batch=len(ids) + 8, n_threads=int(threads), n_gpu_layers=0,
        logits_all=True, verbose=False,
    )  # fmt: skip
    print(json.dumps(llama.tokenize(text.encode(), add_bos=False, special=False)))
    llama.eval(ids)
    np.save(out, np.array(llama.scores[: len(ids)], dtype=np.float32))


if __name__ == "__main__":
    main()
