"""A variant that another engine makes: what it asks for is held against what that engine can do."""

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
    values: Mapping[str, Any],
    given: Collection[str],
    place: tuple[Key, ...],
) -> dict[str, Any]:
    """A variant's parameters; where the recipe leaves them open, as its engine has them.

    Args:
        values: every parameter, with the section's and our defaults. given: those that stand at ``place`` itself.

    Raises:
        RecipeError: the recipe asks for what the engine cannot do.
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
        raise located.error((method, "fail_on"), f"{engine.title} does not tell what to fail on; leave it out")
    return engine.fitted(method, values, stated)
