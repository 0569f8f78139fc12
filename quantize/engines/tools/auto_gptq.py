"""AutoGPTQ 0.7.1, archived: the original GPTQ tool. https://github.com/AutoGPTQ/AutoGPTQ"""

from __future__ import annotations

from typing import Any

ENGINE: dict[str, Any] = {
    "name": "auto-gptq",
    "package": "auto-gptq",
    "version": "0.7.1",
    "summary": "GPTQ by the archived original, old pins; needs a GPU",
    "methods": {
        "gptq": {
            "layout": "gptq",
            "true_sequential": True,
            "needs": "cuda",
            "values": {
                "desc_act": (False, True, "static"),
                "act_group_aware": (False,),
                "mse": (False,),
                "propagate": ("quantized",),
            },
            "reasons": {
                "act_group_aware": "it predates it",
                "mse": "it has no range search",
                "propagate": "it always calibrates on its own quantized activations",
            },
        },
    },
    "requirements": (
        "transformers==4.51.3", "torch==2.13.0", "peft<0.18", "datasets<4", "huggingface-hub<1", "accelerate",
        "sentencepiece", "rouge", "gekko", "safetensors", "tqdm",
    ),
    # its own requirements ask for a CUDA build of a torch of its time
    "without_dependencies": ("auto-gptq==0.7.1",),
    "constraints": """
        accelerate==1.15.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0
        certifi==2026.10.18 charset-normalizer==3.5.2 datasets==3.6.0 dill==0.3.8 filelock==4.2.11
        frozenlist==1.8.0 fsspec==2025.3.0 gekko==1.3.3 hf-xet==1.8.0 huggingface_hub==0.36.2 idna==3.20
        jinja2==3.1.6 markupsafe==3.0.4 mpmath==1.3.0 multidict==7.2.1 multiprocess==0.70.16 networkx==3.6.1
        numpy==2.4.6 packaging==26.3 pandas==3.1.1 peft==0.17.1 propcache==0.5.4 psutil==7.2.2 pyarrow==26.0.1
        python-dateutil==4.0.0 pyyaml==6.0.3 regex==2026.11.15 requests==2.34.2 rouge==1.0.1 safetensors==0.8.0
        sentencepiece==0.2.3 setuptools==84.2.1 six==1.17.0 sympy==1.14.0 tokenizers==0.21.4 torch==2.13.0
        tqdm==4.70.1 transformers==4.51.3 typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0 xxhash==4.1.0
        yarl==1.25.1 zstandard==0.25.0
    """,
    "packages": ("auto-gptq", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
}  # fmt: skip


def check() -> dict[str, Any]:
    """Import the engine and report what this environment can run."""
    import auto_gptq
    import torch

    return {"version": auto_gptq.__version__, "cuda": torch.cuda.is_available()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize; return the device and dtype used."""
    import numpy as np
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    asked = request["parameters"]
    config = BaseQuantizeConfig(
        bits=asked["bits"], group_size=asked["group_size"], damp_percent=asked["damp_percent"],
        desc_act=bool(asked["desc_act"]), static_groups=asked["desc_act"] == "static", sym=asked["sym"],
        true_sequential=True,
    )  # fmt: skip
    trust = request["trust_remote_code"]
    dtype = torch.float16
    model = AutoGPTQForCausalLM.from_pretrained(request["source"], config, torch_dtype=dtype, trust_remote_code=trust)
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        for row in torch.from_numpy(np.load(request["ids"]))
    ]
    model.quantize(rows, batch_size=1)
    model.save_quantized(request["out"], use_safetensors=True)
    return {"device": request["device"], "dtype": str(dtype).removeprefix("torch.")}
