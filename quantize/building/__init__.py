"""Runs a plan; the only place that knows the order of things."""

from quantize.building.build import BuildResult
from quantize.building.run import build_recipe

__all__ = ["BuildResult", "build_recipe"]
