"""The schema of a recipe: allowed keys and values, and defaults.

Pure data; no torch, no files. Field names are the keys of the YAML and the usual terms of the field.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from quantize.errors import shortly
from quantize.recipe.methods import METHODS, Awq, Gguf, Gptq, Method, Size, Strict, Variant
from quantize.recipe.presets import PRESETS
from quantize.recipe.quantized import Quantized

REPO_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
"""One half of a hub id, as accepted by the hub and its client."""
MOST_NAME = 200


def _line(value: str) -> str:
    if not value.isprintable() or len(value) > MOST_NAME:
        raise ValueError(f"must be one line of at most {MOST_NAME} characters")
    return value


Line = Annotated[str, AfterValidator(_line)]
"""A name shown in the headings, tables and links of cards."""


class Model(Strict):
    """The source model, and what the card says about it."""

    source: str = Field(min_length=1)
    """Hub id (``org/name``), local directory, ``.gguf`` file, or ``package:NAME`` (a GGUF in a Python package)."""
    revision: str = "main"
    base_model: str | None = None
    """Hub id of the original model in the card; by default the source, if it is a hub id."""
    name: Line | None = None
    creator: Line | None = None
    prompt_template: str | None = None
    license: Line | None = None
    trust_remote_code: bool = False

    @field_validator("base_model")
    @classmethod
    def _base_model(cls, value: str | None) -> str | None:
        if value is not None and not (value.count("/") == 1 and all(map(REPO_NAME.fullmatch, value.split("/")))):
            raise ValueError(f"{value!r} is not a hub id; write org/name")
        return value


class Release(Strict):
    """Owner and names of the repos, size of shards, and contents of cards."""

    owner: str = "local"
    quantized_by: Line | None = None
    repo: str = "{owner}/{model}-{METHOD}"
    max_shard_size: Size = 5_000_000_000
    templates: str | None = None
    """Folder whose ``gptq.md.j2``, ``_head.md.j2`` and so on replace the shipped ones."""
    card_header: str | None = None
    """The publisher's Markdown file at the top of each card; ``card_footer`` is placed before the original card."""
    card_footer: str | None = None

    @field_validator("owner")
    @classmethod
    def _owner(cls, value: str) -> str:
        if not REPO_NAME.fullmatch(value):
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
            raise ValueError("must contain {METHOD}, so that each method has its own repo")
        return value


class RepoNameError(ValueError):
    """A repo name that the hub would not accept, or that would leave the dist folder."""


def repo_id(template: str, owner: str, model: str, method: str) -> str:
    """Fill a repo template. Raises :class:`RepoNameError` if the result is not of the form ``owner/name``."""
    if re.search(r"\{[^{}]*[.\[!:]", template):
        raise KeyError(template)
    name = template.format(owner=owner, model=model, METHOD=method.upper(), method=method.lower())
    parts = name.split("/")
    if len(parts) > 2 or not all(REPO_NAME.fullmatch(part) for part in parts):
        raise RepoNameError(f"gives '{name}', which is not a hub repo name of the form owner/name")
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
    data_files: tuple[str, ...] = ()
    """Of a hub dataset: the files to read, such as ``en/c4-train.00000-of-01024.json.gz``."""

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Corpus:
        if sum(value is not None for value in (self.preset, self.hub, self.file)) != 1:
            raise ValueError("name exactly one of preset, hub or file")
        if self.preset and any((self.config, self.split, self.column, self.revision, self.data_files)):
            raise ValueError("a preset takes no config, split, column, revision or data_files; use hub: instead")
        if self.file and any((self.config, self.split, self.revision, self.data_files)):
            raise ValueError("a file takes only column (of a .jsonl file)")
        return self


def _corpora(value: Any) -> Any:
    """Turn ``wikitext``, ``./notes.txt``, ``org/name`` or a mapping, alone or in a list, into a list of mappings."""
    return [_corpus(item) for item in value] if isinstance(value, list) else [_corpus(value)]


def _corpus(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "./", "../", "~")) or value.endswith((".txt", ".raw", ".utf8", ".md", ".jsonl")):
        return {"file": value}
    return {"hub": value} if "/" in value else {"preset": value}


class Calibration(Strict):
    """The calibration text, and its ``samples`` windows of ``sequence_length`` tokens."""

    dataset: Annotated[list[Corpus], BeforeValidator(_corpora), Field(min_length=1)] = Field(
        default_factory=lambda: [Corpus(preset="wikitext")]
    )
    samples: int = Field(default=128, ge=1, le=1_000_000, strict=True)
    sequence_length: int = Field(default=2048, ge=8, le=1_000_000, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True)
    batch_tokens: int = Field(default=4096, ge=1, strict=True)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def _held_out(value: Any) -> Any:
    return None if value == "auto" or value is None else _corpora(value)


def _nats(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"must be a number of nats above 0, auto or null, not {shortly(value)}")
    return float(value)


class Measure(Strict):
    """The held-out text for measuring finished branches, and how much of it is used."""

    dataset: Annotated[list[Corpus] | None, BeforeValidator(_held_out)] = None
    """``auto`` (None): the test split of wikitext if the calibration text comes from a hub, else a text shipped with
    CPython."""
    samples: int = Field(default=16, ge=1, le=1_000_000, strict=True)
    sequence_length: int = Field(default=512, ge=8, le=1_000_000, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**32, strict=True)
    allow_calibration_text: bool = False
    """Allow measuring on the calibration text; the card then says so."""
    max_kl: Annotated[float | Literal["auto"] | None, BeforeValidator(_nats)] = "auto"
    """Largest KL divergence from the source, in nats, of a variant that is not an error. ``auto`` is by bits of a
    weight: 5 nats up to 2 bits, 2.5 at 3, 1 at 4, 0.5 at 5 to 7, 0.25 from 8 up. ``null`` is no such bound."""
    max_kl_ratio: Annotated[float | None, Field(gt=1, allow_inf_nan=False)] = 10.0
    """Largest multiple of the worst other variant with the same or fewer bits; applied above 0.5 nats. ``null`` is no
    such bound."""

    def corpora(self, calibration: Calibration) -> list[Corpus]:
        """The texts, with ``auto`` resolved."""
        if self.dataset is not None:
            return self.dataset
        remote = any(corpus.hub or PRESETS[str(corpus.preset)].hub for corpus in calibration.dataset if not corpus.file)
        return [Corpus(preset="wikitext-test" if remote else "docstrings")]


class Recipe(Strict):
    """A whole recipe, as validated data."""

    model: Model
    release: Release = Release()
    calibration: Calibration = Calibration()
    measure: Measure = Measure()
    quantize: Quantized = Quantized()
    gptq: Gptq | None = None
    awq: Awq | None = None
    gguf: Gguf | None = None

    def section(self, method: Method) -> Gptq | Awq:
        """The section of a method, which this recipe must have."""
        section: Gptq | Awq | None = getattr(self, method)
        assert section is not None
        return section

    def variants(self, method: Method) -> list[Variant]:
        """The variants of a method, in the recipe's order."""
        return list(self.section(method).variants)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods with their own branches for which this recipe has a section."""
        return tuple(method for method in METHODS if getattr(self, method) is not None)
