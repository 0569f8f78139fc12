"""Keys identify the request for a variant. Under equal circumstances, equal keys mean equal bytes.

A key covers source, text, parameters and the versions of our algorithms. What the machine and the command line add
(:mod:`quantize.planning.circumstances`) is recorded in the manifest instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quantize.errors import printable, shortened
from quantize.recipe.methods import Awq, Gptq, Method, Variant
from quantize.recipe.schema import Release

SOLVER_VERSION = 6
"""Raise it when the bytes for the same source, tokens and parameters change: finished variants become stale."""
STATISTICS_VERSION = 2
"""Raise it when the statistics for the same source and windows change, saved ones and importance matrices included."""
LISTS = frozenset({"variants", "matrix"})
JUDGEMENTS = frozenset({"fail_on", "min_expert_tokens"})
"""Reporting and failure settings of a method: they never change weights and are left out of the key."""

LONGEST = 120
"""Characters of a name or a value shown in a line about a change."""

DOOR_VERSION = 1
"""The same for external engines: raise it when they are called, or their results rewritten, in another way."""


def key_inputs(
    hashes: Mapping[str, str],
    calibration: Mapping[str, Any],
    method: Method,
    section: Gptq | Awq,
    *,
    variant: Variant,
    release: Release,
    engine: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Everything that determines the bytes of a branch's weights and configs, as plain data.

    Args:
        engine: identity of the external engine and its environment; None for our own solvers, whose version is used
            instead.
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
    """Differences between two sets of inputs, one line each: ``parameters.bits: 4 -> 8``."""
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        label = f"{path}.{name}" if path else name
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, label)
        elif old != new:
            # old values may come from an untrusted manifest
            lines.append(printable(f"{shortened(label, LONGEST)}: {_short(old)} -> {_short(new)}"))
    return lines


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) > 20:
        return value[:12] + "…"
    return "(none)" if value is None else shortened(json.dumps(value, ensure_ascii=False), LONGEST)
