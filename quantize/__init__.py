"""quantize: one recipe turns one causal language model into a complete quantized release.

What the command line can do, Python can do too (:mod:`quantize.api`); importing the package imports nothing heavy::

    import quantize

    recipe = quantize.load_recipe("recipes/demo.yaml")
    print(quantize.plan(recipe).as_data())
    quantize.build(recipe, quantize.BuildOptions(dist="dist"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantize.api import (
        BuildOptions,
        MeasureOptions,
        PlanOptions,
        PruneOptions,
        PushOptions,
        RebuildOptions,
        Reporter,
        Selection,
        VerifyOptions,
        build,
        diff,
        export_git,
        lint,
        load_recipe,
        measure,
        orphans,
        plan,
        prune,
        push,
        rebuild,
        render_cards,
        report,
        verify,
    )

__all__ = [
    "BuildOptions",
    "MeasureOptions",
    "PlanOptions",
    "PruneOptions",
    "PushOptions",
    "RebuildOptions",
    "Reporter",
    "Selection",
    "VerifyOptions",
    "__version__",
    "build",
    "diff",
    "export_git",
    "lint",
    "load_recipe",
    "measure",
    "orphans",
    "plan",
    "prune",
    "push",
    "rebuild",
    "render_cards",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("quantize.api"), name)


def __dir__() -> list[str]:
    return __all__
