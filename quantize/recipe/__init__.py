"""Recipes: the schema, YAML loading with line numbers, named presets, the shipped files."""

from quantize.recipe.load import LoadedRecipe, load_recipe
from quantize.recipe.methods import AwqVariant, GptqVariant, Method, Variant
from quantize.recipe.schema import Recipe

__all__ = ["AwqVariant", "GptqVariant", "LoadedRecipe", "Method", "Recipe", "Variant", "load_recipe"]
