"""The model card, rendered from a template. What comes from outside is data to it, never template code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from quantize import __version__
from quantize.calibration.corpus import title, url
from quantize.formats.manifest import read_manifest
from quantize.formats.tensors import DTYPE_BYTES
from quantize.planning import Plan, PlannedVariant
from quantize.recipe.levels import LEVELS
from quantize.recipe.methods import AwqVariant, GptqVariant, Method

HUB = "https://huggingface.co"


def render_card(plan: Plan, method: Method) -> str:
    """``README.md`` of every branch of a method's repo: metadata, provided files, how to use."""
    return _render(plan, method, "transformers", [_row(plan, item) for item in plan.of(method)])


def render_gguf_card(plan: Plan) -> str:
    """``README.md`` of the GGUF repo."""
    assert plan.gguf
    manifest = (read_manifest(plan.gguf.folder) or {}).get("levels") or {}
    elements = sum(spec.nbytes // DTYPE_BYTES[spec.dtype] for spec in plan.source.checkpoint.tensors.values())
    rows = []
    for item in plan.gguf.levels:
        built = sum(file["bytes"] for file in manifest.get(item.level, {}).get("files", {}).values())
        nbytes = built or item.nbytes
        rows.append({
            "file": item.file,
            "link": f"{HUB}/{item.repo}/blob/main/{item.file}",
            "level": item.level,
            "bits": f"{8 * nbytes / elements:.2f}",
            "size": f"{nbytes / 1e9:.2f} GB",
            "use": LEVELS[item.level].use,
        })  # fmt: skip
    return _render(plan, "gguf", "gguf", rows, imatrix=plan.gguf.imatrix_file)


def _render(plan: Plan, method: str, library: str, rows: list[dict[str, Any]], **more: Any) -> str:
    from huggingface_hub import ModelCardData
    from jinja2 import PackageLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=PackageLoader("quantize.release"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    recipe, source = plan.recipe, plan.source
    front, original = source_card(source.checkpoint.folder)
    name = recipe.model.name or source.short_name
    given = front.get("tags")
    tags = given if isinstance(given, list) else []
    metadata = ModelCardData(
        base_model=source.hub_id,
        base_model_relation="quantized" if source.hub_id else None,
        inference=False,
        language=front.get("language"),
        library_name=library,
        license=recipe.model.license or front.get("license"),
        license_link=front.get("license_link"),
        license_name=front.get("license_name"),
        model_creator=recipe.model.creator,
        model_name=name,
        model_type=source.checkpoint.model_type,
        pipeline_tag="text-generation",
        prompt_template=recipe.model.prompt_template,
        quantized_by=recipe.release.quantized_by or recipe.release.owner,
        tags=sorted({*(str(tag) for tag in tags), method}),
    )
    return environment.get_template(f"{method}.md.j2").render(
        metadata=metadata.to_yaml(line_break="\n").strip(),
        name=name,
        creator=recipe.model.creator,
        hub=HUB,
        repo=plan.repos[method],
        siblings={other.upper(): repo for other, repo in plan.repos.items() if other != method},
        hub_id=source.hub_id,
        license=recipe.model.license or front.get("license"),
        prompt_template=recipe.model.prompt_template,
        rows=rows,
        samples=recipe.calibration.samples,
        version=__version__,
        original=original,
        **more,
    )


def source_card(folder: Path | None) -> tuple[dict[str, Any], str]:
    """Front matter and text of the source's README; a card that is missing or broken gives empty ones."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace") if folder else ""
    except OSError:
        return {}, ""
    match = re.match(r"\A﻿?---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    if not match:
        return {}, text.strip()
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}, text[match.end() :].strip()


def _row(plan: Plan, item: PlannedVariant) -> dict[str, Any]:
    calibration, variant = plan.recipe.calibration, item.variant
    datasets = [f"[{title(corpus)}]({url(corpus)})" if url(corpus) else title(corpus) for corpus in calibration.dataset]
    row = {
        "branch": item.branch,
        "link": f"{HUB}/{item.repo}/tree/{item.branch}",
        "bits": variant.bits,
        "group_size": "None" if variant.group_size == -1 else variant.group_size,
        "dataset": ", ".join(datasets),
        "length": calibration.sequence_length,
        "size": f"{item.nbytes / 1e9:.2f} GB",
    }
    if isinstance(variant, GptqVariant):
        exllama = variant.bits == 4 and plan.source.checkpoint.model_type in {"llama", "mistral"}
        return row | {
            "order": {True: "Yes", False: "No", "static": "Static"}[variant.desc_act],
            "damp": f"{variant.damp_percent:g}",
            "exllama": "Yes" if exllama else "No",
            "description": _gptq_description(variant),
        }
    return row | {"zero_point": "Yes" if variant.zero_point else "No", "description": _awq_description(variant)}


def _group(group_size: int) -> str:
    return "no group size, for the lowest memory use" if group_size == -1 else f"group size {group_size}"


def _gptq_description(variant: GptqVariant) -> str:
    order = {
        True: "with act-order, for higher accuracy",
        False: "without act-order, read by every loader",
        "static": "with static act-order: its accuracy, and read by every loader",
    }[variant.desc_act]
    grid = "" if variant.sym else " Asymmetric grid."
    own = " Calibrated on its own quantized activations." if variant.propagate == "quantized" else ""
    return f"{variant.bits}-bit, {_group(variant.group_size)}, {order}.{grid}{own}"


def _awq_description(variant: AwqVariant) -> str:
    grid = "" if variant.zero_point else " Symmetric grid."
    rounding = "rounded by GPTQ" if variant.rounding == "gptq" else "rounded to nearest"
    return f"{variant.bits}-bit, {_group(variant.group_size)}, scaled by activation and {rounding}.{grid}"
