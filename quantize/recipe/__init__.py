"""Recipes: the schema, YAML loading with line numbers, named presets, the shipped files."""

from quantize.recipe.load import LoadedRecipe, load_recipe
from quantize.recipe.schema import GptqVariant, Recipe

__all__ = ["GptqVariant", "LoadedRecipe", "Recipe", "load_recipe"]
