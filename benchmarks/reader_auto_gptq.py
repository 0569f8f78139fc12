"""Runs inside the archived environment: ``BRANCH IDS.npy LOGITS.npy``; loads a branch with auto-gptq on the CPU."""

import json
import sys

import numpy as np
import torch
import transformers
from auto_gptq import AutoGPTQForCausalLM, __version__


def main():
    branch, ids, out = sys.argv[1:]
    model = AutoGPTQForCausalLM.from_quantized(
        branch,
        device="cpu",
        model_basename="model",
        use_safetensors=True,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float32,
    )
    with torch.inference_mode():
        logits = model.model(torch.from_numpy(np.load(ids))).logits.float()
    np.save(out, logits.numpy())
    print(json.dumps({"auto-gptq": __version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    main()
