"""Check a variant for an external engine against what that engine supports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from quantize.engines import NATIVE, find_engine
from quantize.recipe.located import Key, Located
from quantize.recipe.methods import Awq, Gptq, Method


def fitted(
    located: Located,
    method: Method,
    section: Gptq | Awq,
    *,
    values: Mapping[str, Any],
    given: Collection[str],
    place: tuple[Key, ...],
) -> dict[str, Any]:
    """A variant's parameters, with the engine's values for those that the recipe does not set.

    Args:
        values: every parameter, with the section's and our defaults. given: those set at ``place`` itself.

    Raises:
        RecipeError: the recipe sets something that the engine does not support.
    """
    if values["engine"] == NATIVE:
        return dict(values)
    engine = find_engine(values["engine"])
    stated = set(given) | (section.model_fields_set & set(values))
    misfit = engine.misfit(method, values, stated)
    if misfit:
        name, message = misfit
        raise located.error((*place, name) if name in given else (method, name), message)
    if section.fail_on:
        raise located.error((method, "fail_on"), f"{engine.title} does not report what to fail on; remove it")
    return engine.fitted(method, values, stated)
