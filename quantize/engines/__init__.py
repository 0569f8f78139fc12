"""External quantization tools for recipes. Each file in ``tools/`` describes and runs one; see docs/engines.md."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from quantize.engines.engine import NATIVE, Ability, Engine

__all__ = ["NATIVE", "Ability", "Engine", "engine_names", "find_engine", "known_engines"]

TOOLS = Path(__file__).with_name("tools")


@cache
def known_engines() -> dict[str, Engine]:
    """Every engine by name. Reads descriptions only; no engine is imported."""
    found = {}
    for module in pkgutil.iter_modules([str(TOOLS)]):
        described = importlib.import_module(f"quantize.engines.tools.{module.name}").ENGINE
        engine = Engine(**described, file=TOOLS / f"{module.name}.py")
        found[engine.name] = engine
    return dict(sorted(found.items()))


def engine_names() -> list[str]:
    """The allowed values of a recipe's ``engine:``."""
    return [NATIVE, *known_engines()]


def find_engine(name: str) -> Engine:
    """The engine with a name from :func:`engine_names`, except ``native``."""
    return known_engines()[name]
