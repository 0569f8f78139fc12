"""What an engine's file says of it, checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

NATIVE = "native"
"""What a recipe calls our own solvers."""

Layout = Literal["gptq", "awq", "compressed-tensors"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ability(_Strict):
    """What an engine can do of one method.

    Attributes:
        layout: the checkpoint format that its results are published in.
        values: for each parameter of the method that it does not take in full, the values that it takes. The first is
            what it does where the recipe says nothing and its default is not among them.
        reasons: for a parameter, why it takes no others, for the error.
        true_sequential: whether statistics are taken again after each part of a block.
        needs: ``cpu`` where a processor is enough, else ``cuda``.
    """

    layout: Layout
    values: Mapping[str, tuple[Any, ...]] = {}
    reasons: Mapping[str, str] = {}
    true_sequential: bool = False
    needs: Literal["cpu", "cuda"] = "cpu"


class Engine(_Strict):
    """A tool that is not ours, run in an environment of its own.

    Attributes:
        name: what a recipe calls it. package: its distribution on the package index. version: the one that is pinned.
        summary: one line on what it is and where it runs.
        methods: by method, what it can do.
        requirements: what is asked of pip; ``constraints`` pins what comes along.
        without_dependencies: installed afterwards, their own word on what they need (and forbid) not heeded.
        packages: whose versions the manifest names.
        variables: of the user's environment, that the tool goes by and is told; ``*`` stands for anything.
        file: where it is described and run.
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
        """Name and version, as people write it."""
        return f"{self.name} {self.version}"

    @property
    def pins(self) -> str:
        """Identity of the pinned environment: a hash of everything that is asked of pip."""
        asked = [sorted(self.requirements), sorted(self.constraints.split()), list(self.without_dependencies)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def misfit(self, method: str, values: Mapping[str, Any], stated: Collection[str]) -> tuple[str, str] | None:
        """The first stated parameter that the engine cannot take, and why; None where it can do it all.

        Args:
            stated: the parameters that the recipe itself names.
        """
        ability = self.methods.get(method)  # type: ignore[call-overload]
        if ability is None:
            able = " and ".join(name.upper() for name in self.methods)
            return "engine", f"{self.title} makes no {method.upper()} here, only {able}"
        for name, allowed in ability.values.items():
            if name in stated and values[name] not in allowed:
                listing = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in allowed)
                why = f" ({ability.reasons[name]})" if name in ability.reasons else ""
                given = json.dumps(values[name]) if isinstance(values[name], bool) else values[name]
                return name, f"{self.title} takes only {listing}, not {given}{why}"
        return None

    def fitted(self, method: str, values: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
        """``values``, where what the recipe left open is what the engine does."""
        allowed = self.methods[method].values  # type: ignore[index]
        return {
            name: allowed[name][0] if name in allowed and name not in stated and value not in allowed[name] else value
            for name, value in values.items()
        }
