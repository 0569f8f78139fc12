"""GPTQModel: GPTQ, and AWQ by its torch backend, on a CPU or a GPU. https://github.com/ModelCloud/GPTQModel"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {
    "name": "gptqmodel",
    "package": "gptqmodel",
    "version": "7.6.0",
    "summary": "GPTQ and AWQ; runs on a CPU, AWQ slowly",
    "methods": {
        "gptq": {
            "layout": "gptq",
            "true_sequential": True,
            "values": {
                "desc_act": (False, True),
                "mse": (False,),
                "propagate": ("quantized",),
            },
            "reasons": {
                "mse": "its own search is not supported here",
                "propagate": "it always calibrates on its own quantized activations",
            },
        },
        "awq": {
            "layout": "awq",
            "values": {"zero_point": (True,), "rounding": ("nearest",), "mse": (True,), "group_size": (32, 64, 128)},
            "reasons": {"mse": "it always searches for the clipping range"},
        },
    },
    "requirements": ("gptqmodel==7.6.0", "torch==2.13.0"),
    "constraints": """
        accelerate==1.15.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 certifi==2026.10.18
        charset-normalizer==3.5.2 click==8.5.1 datasets==5.2.0 defuser==0.0.28 device-smi==0.5.7 dill==0.4.1
        filelock==4.2.11 fsspec==2026.9.0 gptqmodel==7.6.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2
        httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 jinja2==3.1.6 logbar==0.4.15 markdown-it-py==4.3.0
        markupsafe==3.0.4 maturin==1.16.0 mdurl==0.1.2 mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1
        ninja==1.13.2 numpy==2.2.6 packaging==26.3 pandas==3.1.1 pillow==13.0.0 protobuf==7.36.2 psutil==7.2.2
        pyarrow==26.0.1 pydantic==2.14.3 pydantic_core==2.50.4 pygments==2.21.0 pypcre==0.6.4
        python-dateutil==4.0.0 pyyaml==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0 safetensors==0.8.0
        setuptools==84.2.1 shellingham==1.5.4 sympy==1.14.0 threadpoolctl==3.8.0 tokenicer==0.0.14
        tokenizers==0.23.3 torch==2.13.0 torchao==0.18.0 tqdm==4.70.1 transformers==5.23.0 truststore==0.10.5
        typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0
        xxhash==4.1.0
    """,
    "packages": ("gptqmodel", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
}


def check() -> dict[str, Any]:
    """Import the engine and report what this environment can run."""
    import gptqmodel
    import torch

    return {"version": gptqmodel.__version__, "cuda": torch.cuda.is_available()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize; return the device and dtype used, and each module's outcome."""
    # it wants more workers than a small machine has cores, and refuses to run with one
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, request["threads"]))
    import numpy as np
    from gptqmodel import BACKEND, GPTQModel

    config, dtype = _config(request)
    model = GPTQModel.load(request["source"], config, dtype=dtype)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(request["ids"])]
    how = {"backend": BACKEND.AWQ_TORCH} if request["method"] == "awq" else {}
    model.quantize(rows, batch_size=8, **how)
    model.save(request["out"])
    return {
        "device": request["device"],
        "dtype": str(dtype).removeprefix("torch."),
        "modules": _modules(Path(request["out"]) / "quant_log.csv"),
    }


def _config(request: dict[str, Any]) -> tuple[Any, Any]:
    """Its configuration, and the dtype of the model."""
    import torch
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    asked = request["parameters"]
    common = {"bits": asked["bits"], "group_size": asked["group_size"], "device": request["device"],
              "offload_to_disk": False}  # fmt: skip
    if request["method"] == "awq":
        config = QuantizeConfig(sym=not asked["zero_point"], quant_method=METHOD.AWQ, format=FORMAT.GEMM, **common)
        return config, torch.bfloat16  # it rejects float32
    natural = asked["desc_act"] or asked["group_size"] == -1
    config = QuantizeConfig(
        sym=asked["sym"], desc_act=asked["desc_act"], damp_percent=asked["damp_percent"],
        act_group_aware=asked["act_group_aware"] and not natural, **common,
    )  # fmt: skip
    # without bfloat16 instructions its default is many times slower on a CPU
    return config, torch.float32 if request["device"] == "cpu" else torch.float16


def _modules(log: Path) -> list[dict[str, Any]]:
    """Block, local name, damping and outcome of each module, from the log that it writes beside the weights."""
    if not log.is_file():
        return []
    found = []
    with log.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            entry: dict[str, Any] = {"block": int(row["layer"]), "local": row["module"]}
            if row.get("damp"):
                entry["damp_percent"] = float(row["damp"])
            if "fallback" in str(row.get("loss", "")):
                entry["outcome"] = "rtn_fallback"
            found.append(entry)
    return found
