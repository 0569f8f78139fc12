"""What a manifest has to say for its release to be made again. A manifest may come from anybody.

``dist/manifest_schema.py`` describes what every reader goes by; this describes what ``rebuild`` reads beyond it, so
that it can read on without a doubt. Values that go into a recipe are checked there, by the recipe's own schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantize.dist.manifest_schema import FileName, Text
from quantize.recipe.schema import REPO_NAME

Name = Annotated[str, Field(min_length=1, max_length=200)]
Shards = Annotated[int, Field(ge=1, le=1_000_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Source(_Part):
    name: Text
    commit: Annotated[str, Field(pattern=r"^[0-9A-Za-z._/-]{1,200}$")] | None
    files: dict[FileName, Text]


class _Hub(_Part):
    name: Name


class _Corpus(_Part):
    """One of a preset, a hub dataset and a text file."""

    preset: Name | None = None
    hub: _Hub | None = None
    file_sha256: Sha256 | None = None
    column: str | None = None

    @model_validator(mode="after")
    def _one(self) -> _Corpus:
        if sum(value is not None for value in (self.preset, self.hub, self.file_sha256)) != 1:
            raise ValueError("names no preset, hub dataset or text file")
        return self


class _Calibration(_Part):
    corpora: Annotated[list[_Corpus], Field(min_length=1)]
    samples: int
    sequence_length: int
    seed: int


class _BranchCalibration(_Calibration):
    compute_dtype: str


class _Method(_Part):
    name: Literal["gptq", "awq"]


class _BranchInputs(_Part):
    method: _Method
    parameters: dict[Name, Any]
    calibration: _BranchCalibration
    max_shard_size: int


class _Compute(_Part):
    shards: Shards = 1
    batch_tokens: int | None = None


class _Engine(_Part):
    name: Name


class _Recorded(_Part):
    source: _Source
    repo: Name
    branch: Name
    files: dict[FileName, Any] = {}
    versions: dict[Text, Any] = {}
    calibration: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _repo(self) -> _Recorded:
        parts = self.repo.split("/")
        if len(parts) > 2 or not all(REPO_NAME.fullmatch(part) for part in parts):
            raise ValueError("its repo is no owner/name")
        return self


class _Branch(_Recorded):
    key_inputs: _BranchInputs
    compute: _Compute
    engine: _Engine | None = None


class _BaseModel(_Part):
    repo_url: Text


class _Authorship(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    quantized_by: Text = Field(alias="general.quantized_by")
    license: Text | None = Field(alias="general.license", default=None)
    author: Text | None = Field(alias="general.author", default=None)
    base_models: list[_BaseModel] | None = Field(alias="general.base_models", default=None)


class _Conversion(_Part):
    outtype: Name
    name: Text
    authorship: _Authorship


class _LevelInputs(_Part):
    conversion: _Conversion
    tensor_types: dict[Name, Any]
    max_file_size: int
    imatrix: dict[str, Any] | None
    solve: dict[str, Any] | None = None


class _Level(_Part):
    key_inputs: _LevelInputs
    files: dict[FileName, Any]


class _ImatrixInputs(_Part):
    sha256: Sha256 | None = None
    calibration: _Calibration | None = None
    compute_dtype: str | None = None

    @model_validator(mode="after")
    def _gathered(self) -> _ImatrixInputs:
        if self.calibration is not None and self.compute_dtype is None:
            raise ValueError("does not say in which dtype it was calibrated")
        return self


class _Imatrix(_Part):
    key_inputs: _ImatrixInputs | None = None
    files: Annotated[dict[FileName, Any], Field(min_length=1)]
    shards: Shards = 1


class _Levels(_Recorded):
    levels: Annotated[dict[Name, _Level], Field(min_length=1)]
    imatrix: _Imatrix | None = None
    compute: dict[str, Any] | None = None


def lacking(manifest: Mapping[str, Any]) -> str | None:
    """Why a release cannot be made again from a manifest, in a few words; None where it can."""
    kind: type[_Recorded] = _Levels if "levels" in manifest else _Branch
    try:
        kind.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(key)[:60] for key in first["loc"][:8])
        reason = first["msg"].removeprefix("Value error, ")
        return f"{place}: {reason}" if place else reason
    return None
