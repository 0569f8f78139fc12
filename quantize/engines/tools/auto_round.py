"""AutoRound: rounding learned by signed gradient descent, in GPTQ's and AWQ's formats. https://github.com/intel/auto-round"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}
WHY = "it learns the rounding and has no such setting"

ENGINE: dict[str, Any] = {
    "name": "auto-round",
    "package": "auto-round",
    "version": "0.16.1",
    "summary": "learned rounding in GPTQ's and AWQ's formats; runs on a CPU, slowly",
    "methods": {
        "gptq": {
            "layout": "gptq",
            "values": {
                "desc_act": (False,),
                "act_group_aware": (False,),
                "damp_percent": (0.01,),
                "mse": (False,),
                "propagate": ("quantized",),
            },
            "reasons": {
                "desc_act": "it learns the rounding and has no column order",
                "act_group_aware": WHY,
                "damp_percent": WHY,
                "mse": WHY,
                "propagate": "it calibrates on its own quantized activations",
            },
        },
        "awq": {
            "layout": "awq",
            "values": {"rounding": ("nearest",), "damp_percent": (0.01,), "mse": (False,)},
            "reasons": {"rounding": WHY, "damp_percent": WHY, "mse": WHY},
        },
    },
    "requirements": ("auto-round==0.16.1", "torch==2.13.0"),
    "constraints": """
        accelerate==1.15.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 auto-round==0.16.1
        certifi==2026.10.18 charset-normalizer==3.5.2 click==8.5.1 datasets==5.2.0 dill==0.4.1 filelock==4.2.11
        fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0
        idna==3.20 jinja2==3.1.6 markdown-it-py==4.3.0 markupsafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0
        multiprocess==0.70.19 networkx==3.6.1 numpy==2.4.6 packaging==26.3 pandas==3.1.1 psutil==7.2.2
        py-cpuinfo==9.0.0 pyarrow==26.0.1 pydantic==2.14.3 pydantic_core==2.50.4 pygments==2.21.0
        python-dateutil==4.0.0 pyyaml==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0 safetensors==0.8.0
        setuptools==84.2.1 shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3 torch==2.13.0 tqdm==4.70.1
        transformers==5.23.0 truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0
        tzdata==2026.6 urllib3==2.8.0 xxhash==4.1.0
    """,
    "packages": ("auto-round", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
    "variables": ("AR_*",),
}


def check() -> dict[str, Any]:
    """Import the engine and report what this environment can run."""
    import auto_round
    import torch

    return {"version": auto_round.__version__, "cuda": torch.cuda.is_available()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize; return the device and dtype used."""
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked, ids = request["parameters"], torch.from_numpy(np.load(request["ids"]))
    trust, device = request["trust_remote_code"], request["device"]
    dtype = torch.float32 if device == "cpu" else "auto"  # its own choice is slow on a CPU
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=dtype, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(request["source"], trust_remote_code=trust)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    # compiling takes longer than it saves on a CPU
    quantizer = AutoRound(
        model, tokenizer, bits=asked["bits"], group_size=asked["group_size"],
        sym=asked["sym"] if request["method"] == "gptq" else not asked["zero_point"], dataset=rows,
        nsamples=len(ids), seqlen=ids.shape[1], batch_size=min(8, len(ids)), device_map=device, seed=0,
        enable_torch_compile=device != "cpu",
    )  # fmt: skip
    out = Path(request["out"])
    quantizer.quantize_and_save(str(out), format=FORMATS[request["method"]])
    _lift(out)
    return {"device": device, "dtype": str(model.dtype).removeprefix("torch.")}


def _lift(out: Path) -> None:
    """Move its files up from the subfolder into which it saves."""
    if (out / "config.json").is_file():
        return
    for folder in [path.parent for path in out.glob("*/config.json")]:
        for path in folder.iterdir():
            path.rename(out / path.name)
