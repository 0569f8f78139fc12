"""External engines in a plan: their environments, their identity in keys, and why one cannot run here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from quantize.engines import NATIVE, Engine, find_engine
from quantize.engines.engine import Layout
from quantize.engines.environment import Environment
from quantize.errors import EngineError
from quantize.files.cache import cache_folder
from quantize.recipe.methods import GptqVariant, Method, Variant


class Branch(Protocol):
    """Of a planned branch what is asked here."""

    @property
    def method(self) -> Method: ...

    @property
    def label(self) -> str: ...

    @property
    def variant(self) -> Variant: ...


def engine_of(variant: Variant) -> Engine | None:
    """The external engine that makes a variant; None for our own solvers."""
    return None if variant.engine == NATIVE else find_engine(variant.engine)


def layout_of(variant: Variant) -> Layout:
    """The checkpoint format that a variant is published in."""
    method: Method = "gptq" if isinstance(variant, GptqVariant) else "awq"
    engine = engine_of(variant)
    return engine.methods[method].layout if engine else method


def environment_of(engine: Engine) -> Environment:
    """The engine's environment, in the cache; installed or not."""
    return Environment(engine, cache_folder() / "engines")


def identity_of(variant: Variant) -> dict[str, str] | None:
    """Identity, for keys, of the engine that makes a variant; None for our own solvers."""
    engine = engine_of(variant)
    return environment_of(engine).identity if engine else None


def obstacles(items: Iterable[Branch]) -> dict[str, str]:
    """The reason, in one sentence, for each branch whose engine cannot run here at present, by label."""
    found = {}
    for item in items:
        engine = engine_of(item.variant)
        reason = environment_of(engine).obstacle(item.method) if engine else None
        if reason:
            found[item.label] = reason
    return found


def require_engines(items: Iterable[Branch]) -> None:
    """Raise :class:`EngineError` for the first branch whose engine cannot run here."""
    for label, reason in obstacles(items).items():
        raise EngineError(f"{label}: {reason}")
