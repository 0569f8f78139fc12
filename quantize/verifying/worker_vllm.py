"""Child process: vLLM loads a branch and writes greedily; ``FOLDER PROMPT TOKENS``. Answers in JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, prompt, count = sys.argv[1:]
    model = LLM(model=folder, enforce_eager=True, max_model_len=256)
    wish = SamplingParams(temperature=0, max_tokens=int(count), min_tokens=int(count))
    (answer,) = model.generate([prompt], wish)
    start = list(answer.prompt_token_ids)
    written = answer.outputs[0]
    print(json.dumps({"ids": [*start, *written.token_ids], "prompt": len(start), "text": written.text}))


if __name__ == "__main__":
    main()
