"""The schema of a recipe: what may be written, the defaults, and what no loader could read.

Pure data; no torch, no files. Field names are the keys of the YAML, and the field's own terms.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what the GPTQ loaders have kernels for
BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
REPO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

Bits = Literal[2, 3, 4, 8]


def _desc_act(value: Any) -> Any:
    if not (isinstance(value, bool) or value == "static"):
        raise ValueError(f"must be true, false or static, not {value!r}")
    return value


DescAct = Annotated[bool | Literal["static"], BeforeValidator(_desc_act)]
Propagate = Literal["auto", "source", "quantized"]
Outcome = Literal["damp_raised", "dead_columns", "rtn_fallback"]


class Strict(BaseModel):
    """Base of every part of the recipe: unknown keys are errors, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Strict):
    """The source model, and what the card says of it."""

    source: str = Field(min_length=1)
    """Hub id (``org/name``), local directory, ``.gguf`` file, or ``package:NAME`` (a GGUF in a Python package)."""
    revision: str = "main"
    name: str | None = None
    creator: str | None = None
    prompt_template: str | None = None
    license: str | None = None
    trust_remote_code: bool = False


class Release(Strict):
    """Who publishes, under which names, in shards of which size."""

    owner: str = "local"
    quantized_by: str | None = None
    repo: str = "{owner}/{model}-{METHOD}"
    max_shard_size: int = Field(default=5_000_000_000, ge=1_000_000)

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMGT]?)B?\s*", value, re.IGNORECASE)
            if not match:
                raise ValueError("must be a size such as 5GB")
            return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
        return value

    @field_validator("owner")
    @classmethod
    def _owner(cls, value: str) -> str:
        if not REPO_NAME.fullmatch(value) or ".." in value:
            raise ValueError("must be a hub name: letters, digits, '.', '_' and '-'")
        return value

    @field_validator("repo")
    @classmethod
    def _repo(cls, value: str) -> str:
        try:
            repo_id(value, "owner", "model", "gptq")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            if isinstance(error, RepoNameError):
                raise
            raise ValueError("may only use {owner}, {model}, {METHOD} and {method}") from None
        if "{METHOD}" not in value and "{method}" not in value:
            raise ValueError("must contain {METHOD}, so that the methods get repos of their own")
        return value


class RepoNameError(ValueError):
    """A repo name that the hub would not take, or that would leave the dist folder."""


def repo_id(template: str, owner: str, model: str, method: str) -> str:
    """Fill a repo template. Raises :class:`RepoNameError` for a name that is no ``owner/name``."""
    if re.search(r"\{[^{}]*[.\[!:]", template):
        raise KeyError(template)
    name = template.format(owner=owner, model=model, METHOD=method.upper(), method=method.lower())
    parts = name.split("/")
    if len(parts) > 2 or ".." in name or not all(REPO_NAME.fullmatch(part) for part in parts):
        raise RepoNameError(f"gives '{name}', which is no hub repo name of the form owner/name")
    return name


class Corpus(Strict):
    """One calibration text: a preset's name, a hub dataset, or a file. Exactly one of the three."""

    preset: str | None = None
    hub: str | None = None
    file: str | None = None
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Corpus:
        if sum(value is not None for value in (self.preset, self.hub, self.file)) != 1:
            raise ValueError("name exactly one of preset, hub or file")
        if self.preset and any((self.config, self.split, self.column, self.revision)):
            raise ValueError("a preset takes no config, split, column or revision; use hub: instead")
        if self.file and any((self.config, self.split, self.revision)):
            raise ValueError("a file takes only column (of a .jsonl file)")
        return self


def _corpora(value: Any) -> Any:
    """``wikitext``, ``./notes.txt``, ``org/name`` or a mapping, alone or in a list, as a list of mappings."""
    return [_corpus(item) for item in value] if isinstance(value, list) else [_corpus(value)]


def _corpus(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "./", "../", "~")) or value.endswith((".txt", ".raw", ".utf8", ".md", ".jsonl")):
        return {"file": value}
    return {"hub": value} if "/" in value else {"preset": value}


class Calibration(Strict):
    """The calibration text and how it is cut: ``samples`` windows of ``sequence_length`` tokens."""

    dataset: Annotated[list[Corpus], BeforeValidator(_corpora), Field(min_length=1)] = Field(
        default_factory=lambda: [Corpus(preset="wikitext")]
    )
    samples: int = Field(default=128, ge=1, le=1_000_000, strict=True)
    sequence_length: int = Field(default=2048, ge=8, le=1_000_000, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True)
    batch_tokens: int = Field(default=4096, ge=1, strict=True)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class GptqParameters(Strict):
    """The parameters of one GPTQ solve, as the loaders and the papers name them."""

    bits: Bits = 4
    group_size: int = Field(default=128, strict=True)
    desc_act: DescAct = False
    act_group_aware: bool = True
    """Where ``desc_act`` is false: solve groups, and columns in them, by activation. Files are the same kind."""
    sym: bool = True
    damp_percent: float = Field(default=0.1, gt=0, lt=1)
    mse: bool = True
    """Search each group's range for the least error, weighed as the solve weighs it."""
    propagate: Propagate = "auto"
    """Whose activations the statistics are of: the source model's, or those of the blocks quantized so far."""

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        if isinstance(value, bool) or value not in BITS:
            raise ValueError(f"must be one of {', '.join(map(str, BITS))}, not {value!r}")
        return value

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            nearest = min(GROUP_SIZES[1:], key=lambda known: abs(known - value))
            raise ValueError(
                f"must be one of {', '.join(map(str, GROUP_SIZES))} (-1: one group per row), which loaders "
                f"have kernels for, not {value}; the nearest is {nearest}"
            )
        return value


class GptqVariant(GptqParameters):
    """One branch of the GPTQ repo. ``branch`` is always set once a recipe is loaded."""

    branch: str | None = None

    @field_validator("branch")
    @classmethod
    def _branch(cls, value: str | None) -> str | None:
        if value is not None and (not BRANCH.fullmatch(value) or ".." in value or value.endswith((".", ".lock"))):
            raise ValueError(f"{value!r} is no branch name for the hub; use letters, digits, '.', '_' and '-' only")
        return value


class GptqMatrix(Strict):
    """Lists of parameters; every combination becomes a variant."""

    bits: list[int] = Field(default=[], min_length=1)
    group_size: list[int] = Field(default=[], min_length=1)
    desc_act: list[DescAct] = Field(default=[], min_length=1)
    sym: list[bool] = Field(default=[], min_length=1)
    damp_percent: list[float] = Field(default=[], min_length=1)
    mse: list[bool] = Field(default=[], min_length=1)


class Gptq(GptqParameters):
    """Defaults for all GPTQ variants, the variants, and how the method behaves as a whole."""

    variants: list[GptqVariant] = []
    matrix: GptqMatrix | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    zero_bias: bool = False
    rtn_fallback: bool = False
    fail_on: list[Outcome] = []


class Recipe(Strict):
    """A whole recipe, as validated data."""

    model: Model
    release: Release = Release()
    calibration: Calibration = Calibration()
    gptq: Gptq
