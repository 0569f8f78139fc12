"""The description in an engine's file, validated when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

NATIVE = "native"
"""The name of our own solvers in a recipe."""

Layout = Literal["gptq", "awq", "compressed-tensors"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


OURS: Mapping[str, tuple[Any, ...]] = {"damping": ("mean",), "signed_scales": (False,), "polish": (False,)}
"""What an engine does in place of steps that only our own solver has."""


class Ability(_Strict):
    """An engine's support of one method.

    Attributes:
        layout: the checkpoint format in which its results are published.
        values: the supported values of each parameter that is not fully supported. The first is used if the recipe does
            not set the parameter and its default is not supported.
        reasons: why a parameter has no other values, for the error.
        true_sequential: whether statistics are collected again after each part of a block.
        needs: ``cpu`` if a CPU suffices, else ``cuda``.
    """

    layout: Layout
    values: Mapping[str, tuple[Any, ...]] = Field(default={}, validate_default=True)
    reasons: Mapping[str, str] = {}
    true_sequential: bool = False
    needs: Literal["cpu", "cuda"] = "cpu"

    @field_validator("values")
    @classmethod
    def _complete(cls, values: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
        return {**OURS, **values}


class Engine(_Strict):
    """An external tool, run in its own Python environment.

    Attributes:
        name: its name in recipes. package: its distribution on the package index. version: the pinned version.
        summary: one line on what it is and where it runs.
        methods: its support of each method.
        requirements: requirements for pip; ``constraints`` pins their dependencies.
        without_dependencies: requirements installed afterwards, ignoring their dependencies.
        packages: packages whose versions go into the manifest.
        variables: environment variables of the user passed to the tool; ``*`` matches anything.
        file: the file that describes and runs it.
    """

    name: str
    package: str
    version: str
    summary: str
    methods: Mapping[Literal["gptq", "awq"], Ability]
    requirements: tuple[str, ...]
    constraints: str = ""
    without_dependencies: tuple[str, ...] = ()
    packages: tuple[str, ...]
    variables: tuple[str, ...] = ()
    file: Path

    @property
    def title(self) -> str:
        """Name and version for readers."""
        return f"{self.name} {self.version}"

    @property
    def pins(self) -> str:
        """Identity of the pinned environment: a hash of everything passed to pip."""
        asked = [sorted(self.requirements), sorted(self.constraints.split()), list(self.without_dependencies)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def misfit(self, method: str, values: Mapping[str, Any], stated: Collection[str]) -> tuple[str, str] | None:
        """The first stated parameter that the engine does not support, and the reason; None if there is none.

        Args:
            stated: the parameters that the recipe sets.
        """
        ability = self.methods.get(method)  # type: ignore[call-overload]
        if ability is None:
            able = " and ".join(name.upper() for name in self.methods)
            return "engine", f"{self.title} does not support {method.upper()} here, only {able}"
        for name, allowed in ability.values.items():
            if name in stated and values[name] not in allowed:
                listing = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in allowed)
                why = f" ({ability.reasons[name]})" if name in ability.reasons else ""
                given = json.dumps(values[name]) if isinstance(values[name], bool) else values[name]
                return name, f"{self.title} supports only {listing}, not {given}{why}"
        return None

    def fitted(self, method: str, values: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
        """``values``, with parameters that the recipe does not set replaced by what the engine does."""
        allowed = self.methods[method].values  # type: ignore[index]
        return {
            name: allowed[name][0] if name in allowed and name not in stated and value not in allowed[name] else value
            for name, value in values.items()
        }
