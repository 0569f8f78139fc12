"""The part of a recipe that says which linears are quantized."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quantize.recipe.methods import Strict

Pattern = Annotated[str, Field(min_length=1, max_length=200)]


class Quantized(Strict):
    """Which linears of the blocks are quantized, by patterns of their names in the checkpoint (``*.down_proj``)."""

    skip: tuple[Pattern, ...] = ()
    """Linears that stay in 16 bits."""
    only: tuple[Pattern, ...] = ()
    """If given, all others stay in 16 bits; also quantizes gates that would be left out by rule."""
    unread_experts: bool = False
    """Build GPTQ and AWQ branches of mixtures whose quantized experts no loader is known to read."""
    min_share: float = Field(default=0.9, ge=0, le=1)
    """The part of the blocks' weights that must be quantized; a plan with less is refused."""
