"""The items of a plan: branches and GGUF levels, with one protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from quantize.dist.manifest import Manifest, Recorded
from quantize.engines import Engine
from quantize.gguf.quantize import Outcome
from quantize.planning.engines import engine_of, layout_of
from quantize.planning.feedback import Feedback
from quantize.planning.sizes import Layout
from quantize.recipe.levels import MMPROJ
from quantize.recipe.methods import Method, Variant

State = Literal["missing", "stale", "fresh", "taken", "refused"]
"""``taken``: its folder contains another model's release. ``refused``: llama.cpp cannot make it."""


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
        """The name that ``--only`` matches: a branch of the repo, or a level."""

    @property
    def label(self) -> str:
        """Its name in commands and reports, such as ``gptq/main`` or ``gguf/Q4_K_M``."""

    @property
    def folder(self) -> Path:
        """Its folder in dist."""

    @property
    def nbytes(self) -> int:
        """Its exact size in bytes; 0 if unknown."""

    @property
    def state(self) -> State:
        """Whether it is built, and up to date with the recipe."""

    @property
    def why(self) -> str:
        """The reason for the state, in one line."""

    def recorded(self, manifest: Manifest) -> Recorded:
        """Its part of the manifest of its folder."""


@dataclass(frozen=True)
class PlannedVariant:
    """One branch to build.

    Attributes:
        method: the method, whose repo ``repo`` it belongs to.
        variant: its parameters.
        layout: its tensors, shard by shard; ``layout.nbytes`` is exact.
        folder: its folder, ``dist/<repo name>/<branch>``.
        state: ``missing``, ``stale``, ``fresh`` or ``taken`` (its folder contains another model's release); ``why``
            gives the reason in one line.
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
        """Its name in commands and reports, such as ``gptq/main``; every method's repo has a ``main``."""
        return f"{self.method}/{self.branch}"

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def format(self) -> str:
        """The checkpoint format in which it is published: ``gptq``, ``awq`` or ``compressed-tensors``."""
        return layout_of(self.variant)

    @property
    def engine(self) -> Engine | None:
        """The external engine that makes it; None for our own solvers."""
        return engine_of(self.variant)

    def recorded(self, manifest: Manifest) -> Recorded:
        """Its part of the manifest of its folder."""
        return manifest


@dataclass(frozen=True)
class PlannedLevel:
    """One GGUF file to build.

    Attributes:
        repo: name of its repo. level: such as ``Q4_K_M``, or ``MMPROJ``.
        folder: ``dist/<repo name>/main``; ``file`` is its name there.
        outcome: types, fallbacks, exact size; None if llama.cpp could not be run, with the reason in ``why``.
        key_inputs: what its bytes depend on.
        state: ``missing``, ``stale``, ``fresh``, ``taken`` (its folder contains another model's release) or ``refused``
            (llama.cpp cannot make it); ``why`` gives the reason in one line.
        feedback: the tensors that are solved with error feedback; None where all are llama.cpp's.
    """

    repo: str
    level: str
    folder: Path
    file: str
    outcome: Outcome | None
    key_inputs: Mapping[str, Any]
    state: State
    why: str
    feedback: Feedback | None = None

    @property
    def method(self) -> str:
        return "gguf"

    @property
    def branch(self) -> str:
        """The name that ``--only`` matches."""
        return self.level

    @property
    def label(self) -> str:
        return f"gguf/{self.level}"

    @property
    def is_projector(self) -> bool:
        """Whether it is no level, but the encoder and projector of images or sound that go with all levels."""
        return self.level == MMPROJ

    @property
    def wants_imatrix(self) -> bool:
        """Whether it is quantized with an importance matrix."""
        return self.key_inputs["imatrix"] is not None

    @property
    def nbytes(self) -> int:
        return self.outcome.nbytes if self.outcome else 0

    def recorded(self, manifest: Manifest) -> Recorded:
        """Its part of the manifest of its folder."""
        entry: Recorded = (manifest.get("levels") or {}).get(self.level) or {}
        return entry
