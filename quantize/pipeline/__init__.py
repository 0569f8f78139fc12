"""Runs a plan; the only place that knows the order of things."""

from quantize.pipeline.run import BuildResult, build_recipe

__all__ = ["BuildResult", "build_recipe"]
