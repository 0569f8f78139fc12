"""What a command takes besides its recipe or target: one model for Python and for Click.

The names of the fields are the names of the flags; ``cli/flags.py`` makes the flags from the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantize.recipe.methods import Size

Device = Literal["auto", "cpu", "cuda"]


class Options(BaseModel):
    """Frozen, so that a build may hand them on; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HubOptions(Options):
    """Which hub is meant."""

    endpoint: str | None = Field(
        default=None, description="Address of another hub; default is HF_ENDPOINT, else the hub itself."
    )


class Selection(Options):
    """Which finished or planned items are meant."""

    dist: Path = Field(default=Path("dist"), description="Folder that holds the finished branches.")
    only: tuple[str, ...] = Field(
        default=(),
        description="Only branches that match, such as 'gptq-4bit*'; may be repeated.",
        json_schema_extra={"metavar": "PATTERN"},
    )


class PlanOptions(Selection):
    """How a build would run, as far as its plan depends on it."""

    memory: Size | None = Field(
        default=None,
        description="Memory budget, such as 8GB or 8GiB: to stay within it, hidden states are kept in files and less "
        "is solved at once.",
        json_schema_extra={"metavar": "SIZE"},
    )
    shards: int | None = Field(
        default=None,
        ge=1,
        description="Split the calibration windows into N parts. Different N give results that differ by rounding; N "
        "is recorded.",
        json_schema_extra={"metavar": "N"},
    )


class BuildOptions(PlanOptions):
    """How a build is run."""

    device: Device = Field(default="auto", description="Where the model and the solver run.")
    keep_statistics: bool = Field(
        default=False,
        description="Save the source's statistics in the cache: later variants then need no forward pass.",
    )
    ray: str | None = Field(
        default=None,
        description="Run the shards and the solves on a Ray cluster; 'auto' uses a running one, or starts one for this "
        "build.",
        json_schema_extra={"metavar": "ADDRESS"},
    )


class MeasureOptions(Selection):
    """How finished branches are measured."""

    device: Device = Field(default="auto", description="Where the model runs.")
    again: bool = Field(default=False, description="Measure again what has already been measured.")


class RebuildOptions(Options):
    """How a release is built again from its manifests."""

    source: str | None = Field(
        default=None,
        description="The model, where the manifest names no hub id: a directory, .gguf file or package:NAME.",
    )
    text: tuple[Path, ...] = Field(
        default=(), description="A calibration text file, which the manifest names by its hash; may be repeated."
    )
    into: Path | None = Field(
        default=None, description="Build in this folder and keep the result; the default is a temporary folder."
    )
    trust_remote_code: bool = Field(default=False, description="Run the model code in the source's repo.")
    device: Device = Field(default="auto", description="Where the model and the solver run.")


class PushOptions(HubOptions):
    """How a release goes to the hub."""

    create: bool = Field(default=True, description="Create repos that do not exist.")
    private: bool | None = Field(default=None, description="Create repos as private ones; refused for public ones.")
    force: bool = Field(
        default=False, description="Push also what is out of the recipe's bounds (measure.max_kl, max_kl_ratio)."
    )
    overwrite: tuple[str, ...] = Field(
        default=(),
        description="Replace a file on the hub that quantize did not write, such as README.md; may be repeated.",
        json_schema_extra={"metavar": "NAME"},
    )


class PruneOptions(HubOptions):
    """Which branches, levels and files are removed that the recipe no longer names."""

    dist: Path = Field(default=Path("dist"), description="Folder that holds the finished branches.")
    where: Literal["all", "dist", "hub"] = Field(
        default="all", description="Where to look: in dist, on the hub, or in both."
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="Do not remove branches, levels and files that match; may be repeated.",
        json_schema_extra={"metavar": "PATTERN"},
    )


class VerifyOptions(HubOptions):
    """How finished branches are checked."""

    source: str | None = Field(default=None, description="The unquantized model, as a recipe's model.source.")
    load: bool = Field(default=True, description="Load it in the consumers that are installed here.")
    download: bool = Field(
        default=False,
        description="Download a hub repo's branches and check them like folders; else only hashes are checked.",
    )
