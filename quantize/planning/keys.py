"""Keys: what a finished variant was asked to be. Equal keys, under equal circumstances, mean equal bytes.

A key holds what the recipe says and the versions of our own algorithms: source, text, parameters. What the machine and
the command line add (:mod:`quantize.planning.circumstances`) is recorded in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantize.errors import printable, shortened
from quantize.recipe.methods import Awq, Gptq, Method, Variant
from quantize.recipe.schema import Release

SOLVER_VERSION = 4
"""Raised when the same source, tokens and parameters give other bytes: finished variants are then stale."""
STATISTICS_VERSION = 2
"""Raised when the same source and windows give other statistics; also of kept ones and of importance matrices."""
LISTS = frozenset({"variants", "matrix"})
JUDGEMENTS = frozenset({"fail_on", "min_expert_tokens"})
"""Keys of a method's section that change no byte of the weights: what counts as odd, and what of it as an error."""

LONGEST = 120
"""Characters that a line about a change shows of a name or a value."""

DOOR_VERSION = 1
"""The same for what foreign engines made: raised when their results are asked for or rewritten otherwise."""


def key_inputs(
    hashes: Mapping[str, str],
    calibration: Mapping[str, Any],
    method: Method,
    section: Gptq | Awq,
    variant: Variant,
    release: Release,
    engine: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All that determines the bytes of a branch's weights and configs, as plain data.

    Args:
        engine: identity of the foreign engine and its environment; None for our own solvers, whose version stands then
            in its place.
    """
    as_a_whole = set(type(section).model_fields) - set(type(variant).model_fields) - LISTS - JUDGEMENTS
    by_whom = (
        {"engine": {**engine, "door": DOOR_VERSION}}
        if engine
        else {"solver": SOLVER_VERSION, "statistics": STATISTICS_VERSION}
    )
    return {
        **by_whom,
        "source": dict(hashes),
        "calibration": dict(calibration),
        "parameters": variant.model_dump(exclude={"branch", "engine"}),
        "method": {"name": method, **section.model_dump(include=as_a_whole)},
        "max_shard_size": release.max_shard_size,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """What changed between two sets of inputs, one line each: ``parameters.bits: 4 -> 8``."""
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        label = f"{path}.{name}" if path else name
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, label)
        elif old != new:
            # what was there before may come from a stranger's manifest
            lines.append(printable(f"{shortened(label, LONGEST)}: {_short(old)} -> {_short(new)}"))
    return lines


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) > 20:
        return value[:12] + "…"
    return "(none)" if value is None else shortened(json.dumps(value, ensure_ascii=False), LONGEST)
