"""``config.json`` of a branch: the source's config, with keys for both transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize import __version__
from quantize.files.atomic import as_json
from quantize.formats import awq, compressed, gptq
from quantize.planning.engines import environment_of
from quantize.planning.items import PlannedVariant
from quantize.planning.modules import ModuleTable
from quantize.recipe.methods import GptqVariant
from quantize.recipe.schema import Recipe

__all__ = ["as_json", "in_all_words", "loader_config", "release_config"]


def loader_config(
    recipe: Recipe, item: PlannedVariant, table: ModuleTable
) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """Configs of a branch for its loaders: name and content of the method's own config file (None if the format has
    none), and ``quantization_config`` for ``config.json``, which also lists routers that are not quantized."""
    variant = item.variant
    if isinstance(variant, GptqVariant):
        assert recipe.gptq
        if item.format == compressed.METHOD:
            config = compressed.quantization_config(
                bits=variant.bits, group_size=variant.group_size, symmetric=variant.sym,
                static_order=variant.desc_act == "static",
            )  # fmt: skip
            return None, {}, config
        made_by = [f"quantize:{__version__}"]
        if item.engine:
            about = environment_of(item.engine).identity
            made_by = [f"{about['name']}:{about['version']}", *made_by]
        config = gptq.quantize_config(
            **variant.model_dump(include={"bits", "group_size", "desc_act", "act_group_aware", "sym", "damp_percent"}),
            checkpoint_format=recipe.gptq.checkpoint_format,
            true_sequential=item.engine is not None and item.engine.methods["gptq"].true_sequential,
            quantizers=made_by,
            modules=table.kinds if table.routers else None,
        )
        return "quantize_config.json", config, config
    settings = {**variant.model_dump(include={"group_size", "zero_point"}), "left_out": list(table.routers) or None}
    return "quant_config.json", awq.quant_config(**settings), awq.quantization_config(**settings)


def release_config(source: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config with ``quantization_config``, with keys for transformers 4 and 5."""
    return {**in_all_words(source), "quantization_config": dict(quantization)}


def in_all_words(source: Mapping[str, Any]) -> dict[str, Any]:
    """A config with both names of each key that differs between transformers 4 and 5 (``torch_dtype``/``dtype``,
    ``rope_theta`` and ``rope_scaling``/``rope_parameters``)."""
    config = dict(source)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str):
        config["dtype"] = config["torch_dtype"] = dtype
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    return config
