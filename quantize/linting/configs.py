"""Check the configs of a GPTQ or AWQ branch: complete, consistent, and supported by existing kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from quantize.errors import shortly
from quantize.linting.files import RepoFiles
from quantize.linting.findings import Finding, error, note, warning

NAMES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
SAME = {"w_bit": "bits", "q_group_size": "group_size"}
"""AutoAWQ's own names -> those of ``quantization_config``."""
COMPARED = ("bits", "group_size", "desc_act", "sym", "zero_point", "checkpoint_format", "quant_method", "version")
MACHINE_PATH = re.compile(r"^(/|~|[A-Za-z]:\\)")
DEFAULT_THETA = 10000.0
KERNEL_GROUPS = {"gptq": (-1, 32, 64, 128), "awq": (-1, 32, 64, 128)}


def method_of(files: RepoFiles) -> str | None:
    """``gptq``, ``awq``, another method's name, or None if nothing says that the model is quantized."""
    settings = files.config.get("quantization_config")
    if isinstance(settings, dict) and settings.get("quant_method"):
        method = settings["quant_method"]
        return method if isinstance(method, str) else shortly(method)
    return next((method for method, name in NAMES.items() if name in files.sizes), None)


def check_configs(files: RepoFiles) -> Iterator[Finding]:
    """Every finding about ``config.json`` and the method's own file."""
    if "config.json" not in files.sizes:
        yield error("config-missing", "config.json", "is missing; no loader knows the architecture")
        return
    if not files.config:
        yield error("config-broken", "config.json", "is not a JSON object; write it again")
        return
    yield from _check_names(files)
    yield from _check_code(files)
    settings = files.config.get("quantization_config")
    if not isinstance(settings, dict):
        yield error(
            "config-unquantized", "config.json:quantization_config",
            "is missing; transformers, vLLM and TGI take the model for an unquantized one",
        )  # fmt: skip
        return
    method = settings.get("quant_method")
    if isinstance(method, str) and method in NAMES:
        yield from _check_own_file(files, method, settings)
        yield from _check_kernels(files, method, settings)


def _check_own_file(files: RepoFiles, method: str, settings: dict[str, Any]) -> Iterator[Finding]:
    name = NAMES[method]
    if name not in files.sizes:
        yield warning(
            "own-config-missing", name, "is missing; AutoGPTQ and AutoAWQ loaders and text-generation-webui read it"
        )
        return
    own = files.json(name)
    if own is None:
        yield error("own-config-broken", name, "is not a JSON object; write it again")
        return
    there = {SAME.get(key, key): value for key, value in own.items()}
    for key in COMPARED:
        if key in there and key in settings and _plain(there[key]) != _plain(settings[key]):
            yield error(
                "configs-disagree", f"{name}:{key}",
                f"says {shortly(there[key])}, but config.json {shortly(settings[key])}; loaders read one or the other",
            )  # fmt: skip
    base = own.get("model_file_base_name")
    if isinstance(base, str) and not any(
        file.endswith(".safetensors") and file.startswith(base) for file in files.sizes
    ):
        yield warning(
            "base-name", f"{name}:model_file_base_name", f"is {shortly(base)}, but no weight file has this name"
        )


def _check_kernels(files: RepoFiles, method: str, settings: dict[str, Any]) -> Iterator[Finding]:
    bits, group_size = settings.get("bits"), settings.get("group_size")
    place = "config.json:quantization_config"
    if not isinstance(bits, int) or not isinstance(group_size, int) or group_size == 0:
        yield error("config-incomplete", place, "has no integers for bits and group_size")
        return
    if method == "awq" and _plain(settings.get("version", "gemm")) != "gemm":
        yield warning(
            "awq-version", f"{place}.version", f"is {shortly(settings['version'])}; most loaders read gemm only"
        )
    if group_size not in KERNEL_GROUPS[method]:
        known = ", ".join(map(str, KERNEL_GROUPS[method]))
        yield note(
            "group-size", f"{place}.group_size", f"is {shortly(group_size)}; vLLM's Marlin kernels load {known} only"
        )
    if method != "gptq":
        return
    desc_act, sym = settings.get("desc_act"), settings.get("sym", True)
    if settings.get("is_marlin_format") or settings.get("checkpoint_format") == "marlin":
        if desc_act:
            yield error("marlin-act-order", f"{place}.desc_act", "Marlin's own format does not support act-order")
        if not sym or bits != 4 or group_size not in (-1, 128):
            yield error("marlin-format", place, "Marlin's own format is 4-bit, symmetric, group size 128 or -1")
    if bits in (2, 3):
        yield note("few-bits", f"{place}.bits", f"ExLlama's and Marlin's kernels load no {bits}-bit branch")
    if desc_act and group_size != -1:
        yield note(
            "act-order", f"{place}.desc_act",
            "dynamic act-order is ignored by the newest vLLM; offer a branch without it, or with static groups, too",
        )  # fmt: skip
    if not sym:
        yield note("asymmetric", f"{place}.sym", "Marlin's kernels load symmetric branches only; others are slower")


def _check_names(files: RepoFiles) -> Iterator[Finding]:
    """Findings about paths of the publisher's machine, and keys with different names in transformers 4 and 5."""
    for name in ("config.json", *NAMES.values(), "tokenizer_config.json", "generation_config.json"):
        data = files.json(name) or {}
        nested = data.get("quantization_config")
        for part, where in ((data, ""), (nested if isinstance(nested, dict) else {}, "quantization_config.")):
            for key in ("_name_or_path", "model_name_or_path", "name_or_path", "tokenizer_file"):
                value = part.get(key)
                if isinstance(value, str) and MACHINE_PATH.match(value):
                    yield warning(
                        "machine-path",
                        f"{name}:{where}{key}",
                        f"is a path on the publisher's machine ({shortly(value)}); remove it",
                    )
    config = files.config
    old, new = config.get("torch_dtype"), config.get("dtype")
    if old and new and old != new:
        yield warning("dtypes-disagree", "config.json:dtype", f"is {shortly(new)}, torch_dtype is {shortly(old)}")
    parameters = config.get("rope_parameters")
    theta = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    if theta not in (None, DEFAULT_THETA) and config.get("rope_theta") is None:
        yield warning(
            "rope-theta", "config.json:rope_theta",
            f"is missing (rope_parameters has {shortly(theta)}); transformers 4 then uses its default, and the model "
            "produces nonsense",
        )  # fmt: skip
    elif theta is not None and config.get("rope_theta", theta) != theta:
        yield error(
            "rope-theta",
            "config.json:rope_theta",
            f"is {shortly(config['rope_theta'])}, rope_parameters has {shortly(theta)}",
        )


def _check_code(files: RepoFiles) -> Iterator[Finding]:
    auto_map = files.config.get("auto_map")
    for target in auto_map.values() if isinstance(auto_map, dict) else ():
        if isinstance(target, str) and "--" not in target:
            script = target.rpartition(".")[0].replace(".", "/") + ".py"
            if script not in files.sizes:
                yield error("code-missing", "config.json:auto_map", f"names {script}, which is missing")


def _plain(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
