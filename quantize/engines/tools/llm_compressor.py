"""llm-compressor: GPTQ in the compressed-tensors format, which vLLM reads. https://github.com/vllm-project/llm-compressor"""

from __future__ import annotations

from typing import Any

ENGINE: dict[str, Any] = {
    "name": "llm-compressor",
    "package": "llmcompressor",
    "version": "0.14.0.1",
    "summary": "GPTQ as compressed-tensors, for vLLM; runs on a CPU",
    "methods": {
        "gptq": {
            "layout": "compressed-tensors",
            "values": {
                "bits": (4, 8),
                "desc_act": (False, "static"),
                "act_group_aware": (False,),
                "mse": (False,),
                "propagate": ("quantized",),
            },
            "reasons": {
                "bits": "pack-quantized has kernels for no others",
                "desc_act": "like vLLM, it has dropped dynamic act-order",
                "act_group_aware": "it has no such order",
                "mse": "its observer uses the full range",
                "propagate": "it always calibrates on its own quantized activations",
            },
        },
    },
    "requirements": ("llmcompressor==0.14.0.1", "torch==2.13.0"),
    "constraints": """
        accelerate==1.15.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 auto-round==0.15.1
        certifi==2026.10.18 charset-normalizer==3.5.2 click==8.5.1 compressed-tensors==0.19.0 datasets==5.2.0
        dill==0.4.1 filelock==4.2.11 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore==1.0.9 httpx==0.28.1
        huggingface_hub==1.33.0 idna==3.20 jinja2==3.1.6 llmcompressor==0.14.0.1 loguru==0.7.3
        markdown-it-py==4.3.0 markupsafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1
        numpy==2.4.6 nvidia-ml-py==13.615.71 packaging==26.3 pandas==3.1.1 pillow==13.0.0 psutil==7.2.2
        py-cpuinfo==9.0.0 pyarrow==26.0.1 pydantic==2.14.3 pydantic_core==2.50.4 pygments==2.21.0
        python-dateutil==4.0.0 pyyaml==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0 safetensors==0.8.0
        setuptools==84.2.1 shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3 torch==2.13.0 tqdm==4.70.1
        transformers==5.17.0 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0 tzdata==2026.6
        urllib3==2.8.0 xxhash==4.1.0
    """,
    "packages": ("llmcompressor", "compressed-tensors", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
}


def check() -> dict[str, Any]:
    """Import the engine and report what this environment can run."""
    import llmcompressor
    import torch

    return {"version": llmcompressor.__version__, "cuda": torch.cuda.is_available()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize; return the device and dtype used."""
    import numpy as np
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked, ids = request["parameters"], np.load(request["ids"])
    trust = request["trust_remote_code"]
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype="auto", trust_remote_code=trust)
    model.to(request["device"])
    order = "static" if asked["desc_act"] == "static" else None
    whole = asked["group_size"] == -1
    weights = QuantizationArgs(
        num_bits=asked["bits"], symmetric=asked["sym"], strategy="channel" if whole else "group",
        group_size=None if whole else asked["group_size"], actorder=order,
    )  # fmt: skip
    modifier = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"],
        dampening_frac=asked["damp_percent"], actorder=order,
    )  # fmt: skip
    rows = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(request["source"], trust_remote_code=trust),
        dataset=Dataset.from_dict(rows), recipe=[modifier], max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False, pipeline="sequential",
    )  # fmt: skip
    model.save_pretrained(request["out"], save_compressed=True)
    return {"device": request["device"], "dtype": str(model.dtype).removeprefix("torch.")}
