"""AutoAWQ 0.2.9, the last version: the original AWQ tool. https://github.com/casper-hansen/AutoAWQ"""

from __future__ import annotations

from typing import Any

ENGINE: dict[str, Any] = {
    "name": "autoawq",
    "package": "autoawq",
    "version": "0.2.9",
    "summary": "AWQ by the archived original, old pins; runs on a CPU, slowly",
    "methods": {
        "awq": {
            "layout": "awq",
            "values": {
                "zero_point": (True,), "rounding": ("nearest",), "mse": (True, False), "group_size": (32, 64, 128),
            },
            "reasons": {"zero_point": "its GEMM layout requires it", "rounding": "it has no other"},
        },
    },
    # its own requirements without triton, which it imports only on a GPU
    "requirements": (
        "transformers==4.51.3", "torch==2.13.0", "tokenizers", "accelerate", "datasets<4", "huggingface-hub<1",
        "typing-extensions", "zstandard",
    ),
    "without_dependencies": ("autoawq==0.2.9",),
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
    "packages": ("autoawq", "torch", "transformers", "tokenizers", "safetensors", "numpy"),
}  # fmt: skip


def check() -> dict[str, Any]:
    """Import the engine and report what this environment can run."""
    import awq
    import torch

    return {"version": awq.__version__, "cuda": torch.cuda.is_available()}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize; return the device and dtype used."""
    import numpy as np
    import torch
    from awq import AutoAWQForCausalLM

    asked, ids, device = request["parameters"], np.load(request["ids"]), request["device"]
    dtype = torch.float32 if device == "cpu" else torch.float16
    if device == "cpu":
        _repair()
    model = AutoAWQForCausalLM.from_pretrained(
        request["source"], device_map=device, torch_dtype=dtype, trust_remote_code=request["trust_remote_code"]
    )
    settings = {"zero_point": True, "q_group_size": asked["group_size"], "w_bit": asked["bits"], "version": "GEMM"}
    model.quantize(
        None, quant_config=settings, calib_data=ids.tolist(), max_calib_samples=len(ids),
        max_calib_seq_len=ids.shape[1], apply_clip=asked["mse"],
    )  # fmt: skip
    model.save_quantized(request["out"])
    return {"device": device, "dtype": str(dtype).removeprefix("torch.")}


def _repair() -> None:
    """Patch its scale search on a CPU, where the copy of the weights restored after each grid point aliases the
    weights, so that the scales of all points accumulate. A real copy gives the same results as on a GPU."""
    from awq.quantize.quantizer import AwqQuantizer

    search = AwqQuantizer._compute_best_scale

    def repaired(self: Any, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **named: Any) -> Any:
        plain = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: tensor.clone() for name, tensor in plain().items()}
        try:
            return search(self, x, w_mean, x_mean, module2inspect, *rest, **named)
        finally:
            del module2inspect.state_dict

    AwqQuantizer._compute_best_scale = repaired
