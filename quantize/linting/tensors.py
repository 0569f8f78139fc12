"""Check the weights of a GPTQ or AWQ branch by their headers, and by small tensors if reading them is cheap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantize.errors import shortly
from quantize.formats.safetensors_header import Header
from quantize.formats.tensors import INDEX_NAME, TensorSpec
from quantize.linting.files import RepoFiles
from quantize.linting.findings import Finding, capped, error, warning

PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_NAMED = 3
"""Modules with the same fault that are listed; the others are counted."""


def check_weights(files: RepoFiles, method: str | None) -> Iterator[Finding]:
    """Every finding about the safetensors files and their tensors."""
    yield from capped(
        warning("pickle", name, "is a pickle, which can run code when it is read; publish safetensors")
        for name in files.sizes
        if name.endswith(PICKLES) and "/" not in name
    )
    if not files.headers:
        yield error("no-weights", "*.safetensors", "there are none")
        return
    for name, header in files.headers.items():
        if isinstance(header, str):
            yield error("shard-damaged", name, f"{header}; upload it again")
        elif header.nbytes != files.sizes[name]:
            yield error(
                "shard-damaged", name,
                f"has {files.sizes[name]:,} bytes, but its header claims {header.nbytes:,}; upload it again",
            )  # fmt: skip
    tensors = {
        key: spec for header in files.headers.values() if isinstance(header, Header)
        for key, spec in header.tensors.items()
    }  # fmt: skip
    yield from _check_index(files, tensors)
    settings = files.config.get("quantization_config")
    if method in PARTS and isinstance(settings, dict):
        yield from _grouped(_check_modules(files, method, settings, tensors))


def _check_index(files: RepoFiles, tensors: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    if INDEX_NAME not in files.sizes:
        if len(files.headers) > 1:
            yield error(
                "index-missing", INDEX_NAME,
                f"is missing, but there are {len(files.headers)} weight files; loaders cannot find the tensors",
            )  # fmt: skip
        return
    index = files.json(INDEX_NAME) or {}
    table = index.get("weight_map")
    if not isinstance(table, dict):
        yield error("index-broken", INDEX_NAME, "has no weight_map; write it again")
        return
    named = {shard for shard in table.values() if isinstance(shard, str)}
    if any(not isinstance(shard, str) for shard in table.values()):
        yield error("index-broken", INDEX_NAME, "has a weight_map with entries that are not file names; write it again")
    yield from capped(
        error("shard-missing", shard, f"is listed in {INDEX_NAME}, but missing; upload it")
        for shard in sorted(named - set(files.headers))
    )
    yield from capped(
        warning("shard-unused", shard, f"is not listed in {INDEX_NAME}; nothing reads it, but everybody downloads it")
        for shard in sorted(set(files.headers) - named)
    )
    wrong = [
        key for key, shard in table.items()
        if isinstance(shard, str) and isinstance(files.headers.get(shard), Header)
        and (key not in tensors or tensors[key].file != shard)
    ]  # fmt: skip
    for key in wrong[:MOST_NAMED]:
        yield error("index-wrong", f"{INDEX_NAME}:{key}", f"should be in {shortly(table[key])}, but is not")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    real = sum(
        last - first for header in files.headers.values() if isinstance(header, Header)
        for first, last in header.places.values()
    )  # fmt: skip
    if isinstance(total, int) and total != real and not any(isinstance(h, str) for h in files.headers.values()):
        yield warning("total-size", f"{INDEX_NAME}:total_size", f"is {total:,}, but the tensors have {real:,} bytes")


def _check_modules(
    files: RepoFiles, method: str, settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> Iterator[Finding]:
    modules = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if not modules:
        yield error("nothing-quantized", "*.qweight", f"config.json says {method}, but no tensor is quantized")
        return
    bits, group_size = settings.get("bits"), settings.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int) or not 1 <= bits <= 8 or group_size == 0:
        return  # already reported for the config
    for number, module in enumerate(modules):
        missing = [part for part in PARTS[method] if f"{module}.{part}" not in tensors]
        if missing and not (missing == ["g_idx"] and not settings.get("desc_act")):
            yield error("part-missing", f"{module}.{missing[0]}", "is missing; the module cannot be loaded")
            continue
        if f"{module}.weight" in tensors:
            yield warning("twice", f"{module}.weight", "exists besides its quantized tensors; loaders use one of them")
        specs = {part: tensors[f"{module}.{part}"] for part in PARTS[method] if f"{module}.{part}" in tensors}
        yield from _check_shapes(module, method, bits, group_size, specs)
        if files.is_local or number == 0:  # over the network only one module is checked
            yield from _check_values(files, module, settings)


def _check_shapes(
    module: str, method: str, bits: int, group_size: int, specs: Mapping[str, TensorSpec]
) -> Iterator[Finding]:
    shape = specs["qweight"].shape
    if len(shape) != 2:
        yield error("shape", f"{module}.qweight", f"has shape {list(shape)}, not two dimensions")
        return
    inputs = shape[0] * 32 // bits if method == "gptq" else shape[0]
    outputs = shape[1] if method == "gptq" else shape[1] * 32 // bits
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    wanted = {"qzeros": (groups, -(-outputs * bits // 32)), "scales": (groups, outputs), "g_idx": (inputs,)}
    for part, spec in specs.items():
        if part in wanted and spec.shape != wanted[part]:
            should = f"{bits} bits in groups of {shortly(group_size)} make {shortly(wanted[part])}"
            yield error("shape", f"{module}.{part}", f"has shape {shortly(spec.shape)}; {should}")
    if specs["qweight"].dtype != "I32":
        yield error("dtype", f"{module}.qweight", f"is {specs['qweight'].dtype}; loaders read I32")
    if specs["scales"].dtype != "F16":
        yield warning("dtype", f"{module}.scales", f"is {specs['scales'].dtype}; most kernels read F16 only")
    if group_size != -1 and inputs % group_size:
        size = shortly(group_size)
        yield warning("ragged", f"{module}.g_idx", f"{inputs} inputs are not a multiple of {size}; kernels refuse it")


def _check_values(files: RepoFiles, module: str, settings: Mapping[str, Any]) -> Iterator[Finding]:
    import numpy as np

    scales = files.tensor(f"{module}.scales") if files.is_local else None
    if scales is not None and not np.isfinite(scales).all():
        yield error("not-finite", f"{module}.scales", "contains NaN or infinity; the model's output is unusable")
    index = files.tensor(f"{module}.g_idx")
    group_size = settings.get("group_size")
    if index is None or group_size == -1 or index.size == 0:
        return
    natural = np.array_equal(index, np.arange(index.size) // group_size)
    if not natural and not settings.get("desc_act"):
        yield error(
            "act-order-hidden", f"{module}.g_idx",
            "is not in the natural order, but desc_act is false; kernels that trust it compute nonsense",
        )  # fmt: skip


def _grouped(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The first few findings of each kind, then one that counts the rest."""
    seen: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        seen.setdefault((finding.check, finding.place.rpartition(".")[2]), []).append(finding)
    for (check, part), same in seen.items():
        yield from same[:MOST_NAMED]
        if len(same) > MOST_NAMED:
            rest = len(same) - MOST_NAMED
            yield Finding(same[0].severity, check, f"*.{part}", f"the same of {rest} more modules")
