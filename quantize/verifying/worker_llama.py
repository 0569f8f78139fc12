"""Child process: llama.cpp loads a GGUF file and writes greedily; ``FILE PROMPT TOKENS``. Answers in JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from llama_cpp import Llama

    file, prompt, count = sys.argv[1:]
    llama = Llama(model_path=file, n_ctx=256, verbose=False)
    start = llama.tokenize(prompt.encode())
    ids = list(start)
    llama.eval(start)
    for _ in range(int(count)):
        ids.append(llama.sample(temp=0.0, repeat_penalty=1.0))
        llama.eval(ids[-1:])
    text = llama.detokenize(ids[len(start) :]).decode(errors="replace")
    print(json.dumps({"ids": ids, "prompt": len(start), "text": text}))


if __name__ == "__main__":
    main()
