"""Child process: load a branch in a real consumer and generate greedily.

Keys of the arguments: ``consumer``, ``target`` (a folder, or a GGUF file), ``prompt``, ``tokens`` (number to generate).
The answer has ``ids`` (prompt and generated tokens), ``prompt`` (number of tokens of the prompt) and ``text``.
"""

from __future__ import annotations

import os
from typing import Any

Answer = dict[str, Any]


def run(arguments: dict[str, Any]) -> Answer:
    load = {"transformers": _transformers, "gptqmodel": _gptqmodel, "vllm": _vllm, "llama": _llama}
    return load[arguments["consumer"]](arguments["target"], arguments["prompt"], arguments["tokens"])


def _transformers(folder: str, prompt: str, count: int) -> Answer:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto: Any = AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = AutoModelForImageTextToText
    model: Any = auto.from_pretrained(
        folder, dtype=torch.float16, device_map=device, trust_remote_code=False, use_safetensors=True
    )
    quantized = ("qweight", "weight_packed")
    if not any(name.endswith(quantized) for name, _ in [*model.named_buffers(), *model.named_parameters()]):
        raise RuntimeError("loaded, but not as a quantized model")
    return _written(model, folder, prompt, count, device)


def _gptqmodel(folder: str, prompt: str, count: int) -> Answer:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count() or 1))
    import torch
    from gptqmodel import GPTQModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = GPTQModel.load(folder, device=device, trust_remote_code=False).model
    return _written(model, folder, prompt, count, device)


def _written(model: Any, folder: str, prompt: str, count: int, device: str) -> Answer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    written = model.generate(
        **ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, repetition_penalty=1.0
    )[0].tolist()
    start = ids["input_ids"].shape[1]
    return {"ids": written, "prompt": start, "text": tokenizer.decode(written[start:])}


def _vllm(folder: str, prompt: str, count: int) -> Answer:
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, enforce_eager=True, max_model_len=256, trust_remote_code=False)
    (answer,) = model.generate([prompt], SamplingParams(temperature=0, max_tokens=count, min_tokens=count))
    start, written = list(answer.prompt_token_ids), answer.outputs[0]
    return {"ids": [*start, *written.token_ids], "prompt": len(start), "text": written.text}


def _llama(file: str, prompt: str, count: int) -> Answer:
    from llama_cpp import Llama

    llama = Llama(model_path=file, n_ctx=256, verbose=False)
    start = llama.tokenize(prompt.encode())
    ids = list(start)
    llama.eval(start)
    for _ in range(count):
        ids.append(llama.sample(temp=0.0, repeat_penalty=1.0))
        llama.eval(ids[-1:])
    text = llama.detokenize(ids[len(start) :]).decode(errors="replace")
    return {"ids": ids, "prompt": len(start), "text": text}
