"""An engine for the tests: rounds to nearest in 8 bits with numpy alone. FAKE_ENGINE names what it does wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

ENGINE: dict[str, Any] = {
    "name": "fake",
    "package": "numpy",
    "version": "1.0",
    "summary": "rounds to nearest",
    "methods": {
        "gptq": {
            "layout": "gptq",
            "values": {
                "bits": (8,), "desc_act": (False,), "act_group_aware": (False,), "mse": (False,),
                "propagate": ("source",),
            },
            "reasons": {"bits": "it is a fake"},
        },
    },
    "requirements": ("quantize-fake-tool==1.0",),
    "constraints": "quantize-fake-tool==1.0",
    "packages": ("numpy", "safetensors"),
    "variables": ("FAKE_ENGINE",),
}  # fmt: skip


def check() -> dict[str, Any]:
    return {"version": "1.0", "cuda": False}


def run(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    wrong = os.environ.get("FAKE_ENGINE", "")
    print("the log of the fake engine")
    if wrong == "fails":
        raise RuntimeError("out of\n\x1b[31mluck")
    if wrong == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if wrong == "silent":
        sys.stdout.flush()
        os._exit(3)
    config = json.loads((Path(request["source"]) / "config.json").read_text())
    assert {"rope_theta", "rope_parameters", "torch_dtype", "dtype"} <= set(config)
    assert (Path(request["source"]) / "tokenizer.json").is_file()
    ids = np.load(request["ids"])
    assert ids.shape == (2, 64)
    tensors = load_file(Path(request["source"]) / "model.safetensors")
    made = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}  # as peers do
    rows = []
    for name in [name for name in tensors if "_proj.weight" in name]:
        module = name.removesuffix(".weight")
        made.pop(name)
        made.update(_linear(tensors[name].astype(np.float32), module, request["parameters"]["group_size"]))
        block, _, local = module.removeprefix("model.layers.").partition(".")
        rows.append({"block": int(block), "local": local, "damp_percent": 0.25})
    _spoil(wrong, made)
    out = Path(request["out"])
    save_file(made, out / "gptq_model-8bit-32g.safetensors")
    config |= {"quantization_config": {"quant_method": "gptq", "bits": 8}, "_name_or_path": str(out)}
    if wrong != "no config":
        (out / "config.json").write_text(json.dumps(config))
    return {"device": request["device"], "dtype": "float32", "modules": rows}


def _linear(weight: Any, module: str, size: int) -> dict[str, Any]:
    """GPTQ's tensors of a weight [N, K]; zero points are 128, stored as 127."""
    import numpy as np

    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // size, size)
    scale = (np.abs(groups).max(axis=2) / 127).astype(np.float16)
    codes = np.clip(np.round(groups / scale[..., None].astype(np.float32)) + 128, 0, 255).astype(np.uint8)
    codes = codes.reshape(rows, columns).T.reshape(columns // 4, 4, rows)
    words = sum(codes[:, place].astype(np.uint32) << (8 * place) for place in range(4))
    return {
        f"{module}.qweight": np.ascontiguousarray(words).view(np.int32),
        f"{module}.qzeros": np.full((columns // size, rows // 4), 0x7F7F7F7F, dtype=np.int32),
        f"{module}.scales": np.ascontiguousarray(scale.T),
        f"{module}.g_idx": (np.arange(columns) // size).astype(np.int32),
    }


def _spoil(wrong: str, made: dict[str, Any]) -> None:
    import numpy as np

    module = "model.layers.1.mlp.up_proj"
    if wrong == "a tensor is missing":
        del made[f"{module}.scales"]
    elif wrong == "a norm is changed":
        made["model.layers.1.input_layernorm.weight"] = made["model.layers.1.input_layernorm.weight"] * 2
    elif wrong == "NaN":
        made[f"{module}.scales"][0, 0] = np.nan
    elif wrong == "far off":
        made[f"{module}.scales"] = made[f"{module}.scales"][:, ::-1].copy()
    elif wrong == "another shape":
        made[f"{module}.qweight"] = made[f"{module}.qweight"][:-1].copy()
    elif wrong == "hidden order":
        made[f"{module}.g_idx"] = made[f"{module}.g_idx"][::-1].copy()
    elif wrong == "too much":
        made |= {f"lm_head.{part}": made[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
