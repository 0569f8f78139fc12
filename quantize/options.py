"""What a caller may ask of a command that works on a recipe, beside the recipe: one model for Python and for Click.

The names of the fields are the names of the flags; ``cli/flags.py`` makes the flags from the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantize.recipe.methods import Size

Device = Literal["auto", "cpu", "cuda"]


class Selection(BaseModel):
    """Which finished or planned items are meant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dist: Path = Field(Path("dist"), description="Folder that holds the finished branches.")
    only: tuple[str, ...] = Field(
        (),
        description="Only branches that match, such as 'gptq-4bit*'; may be repeated.",
        json_schema_extra={"metavar": "PATTERN"},
    )


class PlanOptions(Selection):
    """How a build would be run, as far as its plan depends on it."""

    memory: Size | None = Field(
        None,
        description="Keep to so much memory, such as 8GB or 8GiB: hidden states then lie in files, and less is solved "
        "at once.",
        json_schema_extra={"metavar": "SIZE"},
    )
    shards: int | None = Field(
        None,
        ge=1,
        description="Split the calibration windows into N parts. Different N give results that differ by rounding; N "
        "is recorded.",
        json_schema_extra={"metavar": "N"},
    )


class BuildOptions(PlanOptions):
    """How a build is run."""

    device: Device = Field("auto", description="Where the model runs and the solver works.")
    keep_statistics: bool = Field(
        False, description="Keep the source's statistics in the cache: later variants then need no forward pass."
    )
    ray: str | None = Field(
        None,
        description="Let a Ray cluster run the shards and solve; 'auto' takes a running one, or starts one for this "
        "build.",
        json_schema_extra={"metavar": "ADDRESS"},
    )


class MeasureOptions(Selection):
    """How finished branches are measured."""

    device: Device = Field("auto", description="Where the model runs.")
    again: bool = Field(False, description="Measure also what was measured before.")
