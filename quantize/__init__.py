"""quantize: one recipe turns one causal language model into a complete quantized release.

The public Python API is three functions; importing the package imports nothing heavy::

    import quantize

    recipe = quantize.load_recipe("recipes/demo.yaml")
    print(quantize.plan(recipe).as_data())
    quantize.build(recipe, dist="dist")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantize.building import build_recipe as build
    from quantize.planning.planner import plan_recipe as plan
    from quantize.recipe import load_recipe

__all__ = ["__version__", "build", "load_recipe", "plan"]

_PUBLIC = {
    "load_recipe": ("quantize.recipe", "load_recipe"),
    "plan": ("quantize.planning.planner", "plan_recipe"),
    "build": ("quantize.building", "build_recipe"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
