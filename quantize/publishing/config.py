"""``config.json`` of a branch: the source's config, with keys for both transformers 4 and 5."""

from __future__ import annotations

import re
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
    none), and ``quantization_config`` for ``config.json``, which also lists what is not quantized."""
    variant = item.variant
    if isinstance(variant, GptqVariant):
        assert recipe.gptq
        if item.format == compressed.METHOD:
            config = compressed.quantization_config(
                bits=variant.bits, group_size=variant.group_size, symmetric=variant.sym,
                static_order=variant.desc_act == "static",
                left_out=[*_inside(table), *(f"re:{pattern}" for pattern in _outside(table))],
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
            selected=gptq.selection(table.kinds if _inside(table) else (), [*_kinds_left(table), *_outside(table)]),
        )
        return "quantize_config.json", config, config
    settings = {
        **variant.model_dump(include={"group_size", "zero_point"}),
        "left_out": [*_inside(table), *_ends(table), *table.outside] or None,
    }
    return "quant_config.json", awq.quant_config(**settings), awq.quantization_config(**settings)


def _inside(table: ModuleTable) -> list[str]:
    """Names of modules inside the blocks that are not quantized."""
    return [one.name for one in table.left if one.block is not None]


def _ends(table: ModuleTable) -> list[str]:
    """Ends of the names of the same modules, where transformers has them below another name; it compares ends too."""
    return [_below_parent(table, name) for name in _inside(table)] if table.is_renamed else []


def _below_parent(table: ModuleTable, name: str) -> str:
    """A name from the list of blocks on, as in ``layers.3.mlp.gate``: loaders have it below other parents."""
    parent, _, _ = table.prefix.removesuffix(".").rpartition(".")
    return name.removeprefix(f"{parent}.") if parent else name


def _kinds_left(table: ModuleTable) -> list[str]:
    """The same as regular expressions: one for all blocks where no block has such a module quantized."""
    found: dict[str, None] = {}
    taken = {_in_any_block(_below_parent(table, name)) for name in table.names}
    for name in (_below_parent(table, name) for name in _inside(table)):
        pattern = _in_any_block(name)
        found[pattern if pattern not in taken else _exactly(name)] = None
    return list(found)


def _in_any_block(name: str) -> str:
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", lambda _: r"\d+", _exactly(name))


def _exactly(name: str) -> str:
    return rf"(.*\.)?{re.escape(name)}$"


def _outside(table: ModuleTable) -> list[str]:
    """Regular expressions of the modules outside the blocks; loaders have them below other parents than checkpoints."""
    found: dict[str, None] = {}
    for name in table.outside:
        parts = name.split(".")
        last = parts[-2:] if parts[-1].isdecimal() else parts[-1:]
        found[rf"(.*\.)?{re.escape('.'.join(last))}(\..*)?$"] = None
    return list(found)


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
