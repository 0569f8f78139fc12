"""What a plan is made of: branches and GGUF levels, under one protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from quantize.dist.manifest import Manifest
from quantize.engines import Engine
from quantize.gguf.quantize import Outcome
from quantize.planning.engines import engine_of, layout_of
from quantize.planning.sizes import Layout
from quantize.recipe.methods import Method, Variant

State = Literal["missing", "stale", "fresh", "taken"]
"""``taken``: its place holds the release of another model."""


class Item(Protocol):
    """One thing to build."""

    @property
    def method(self) -> str:
        """The method, which names its repo: ``gptq``, ``awq`` or ``gguf``."""

    @property
    def repo(self) -> str:
        """The hub repo that it belongs to."""

    @property
    def branch(self) -> str:
        """What ``--only`` matches: a branch of the repo, or a level."""

    @property
    def label(self) -> str:
        """What commands and reports call it: ``gptq/main``, ``gguf/Q4_K_M``."""

    @property
    def folder(self) -> Path:
        """Where it will lie in dist."""

    @property
    def nbytes(self) -> int:
        """Its exact size; 0 where that is not known."""

    @property
    def state(self) -> State:
        """Whether it is built, and of what this recipe says."""

    @property
    def why(self) -> str:
        """The reason of the state, in one line."""

    def recorded(self, manifest: Manifest) -> Manifest:
        """What the manifest of its folder says of it."""


@dataclass(frozen=True)
class PlannedVariant:
    """One branch to build.

    Attributes:
        method: the method, whose repo ``repo`` it belongs to.
        variant: its parameters.
        layout: its tensors, shard by shard; ``layout.nbytes`` is exact.
        folder: where it will lie, ``dist/<repo name>/<branch>``.
        state: ``missing``, ``stale``, ``fresh`` or ``taken`` (its place holds the release of another model); ``why``
            says why in one line.
    """

    method: Method
    repo: str
    variant: Variant
    layout: Layout
    folder: Path
    state: State
    why: str

    @property
    def branch(self) -> str:
        assert self.variant.branch
        return self.variant.branch

    @property
    def label(self) -> str:
        """What commands and reports call it: ``gptq/main``. Every method's repo has a ``main``."""
        return f"{self.method}/{self.branch}"

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def format(self) -> str:
        """The checkpoint format that it is published in: ``gptq``, ``awq`` or ``compressed-tensors``."""
        return layout_of(self.variant)

    @property
    def engine(self) -> Engine | None:
        """What makes it; None for our own solvers."""
        return engine_of(self.variant)

    def recorded(self, manifest: Manifest) -> Manifest:
        """What the manifest of its folder says of it."""
        return manifest


@dataclass(frozen=True)
class PlannedLevel:
    """One GGUF file to build.

    Attributes:
        repo, level: where it belongs and what it is.
        folder: ``dist/<repo name>/main``; ``file`` is its name there.
        outcome: types, fallbacks, exact size; None where llama.cpp could not be asked, which ``why`` then says.
        key_inputs: what its bytes depend on.
        state: ``missing``, ``stale``, ``fresh`` or ``taken`` (its place holds the release of another model); ``why``
            says why in one line.
    """

    repo: str
    level: str
    folder: Path
    file: str
    outcome: Outcome | None
    key_inputs: Mapping[str, Any]
    state: State
    why: str

    @property
    def method(self) -> str:
        return "gguf"

    @property
    def branch(self) -> str:
        """What ``--only`` matches."""
        return self.level

    @property
    def label(self) -> str:
        return f"gguf/{self.level}"

    @property
    def wants_imatrix(self) -> bool:
        """Whether it is made with an importance matrix."""
        return self.key_inputs["imatrix"] is not None

    @property
    def nbytes(self) -> int:
        return self.outcome.nbytes if self.outcome else 0

    def recorded(self, manifest: Manifest) -> Manifest:
        """What the manifest of its folder says of it."""
        entry: Manifest = (manifest.get("levels") or {}).get(self.level) or {}
        return entry
