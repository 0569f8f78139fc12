"""The methods' part of a recipe: the parameters of GPTQ and AWQ variants and GGUF levels."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from quantize.engines import NATIVE, engine_names
from quantize.recipe.levels import LEVEL_SETS, LEVELS, TENSOR_TYPES

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that GPTQ loaders have kernels for
AWQ_GROUP_SIZES = (-1, 32, 64, 128)  # those that AWQ loaders have kernels for
COMMIT_ID = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")
RESERVED = frozenset({"HEAD", "FETCH_HEAD", "ORIG_HEAD", "MERGE_HEAD", "REFS"})
"""Names that git does not take for a branch, such as commit hashes."""
BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Bits = Literal[2, 3, 4, 8]


def _size(value: Any) -> Any:
    # pydantic would also accept a float, and its message gives no example
    try:
        return int(TypeAdapter(ByteSize).validate_python(value if isinstance(value, str) else str(value)))
    except ValidationError:
        raise ValueError("must be a size such as 5GB, 500MB or 8GiB") from None


Size = Annotated[int, BeforeValidator(_size), Field(ge=1_000_000, le=10**15)]
"""Bytes, also written as 5GB (decimal) or 5GiB (binary)."""


def _desc_act(value: Any) -> Any:
    if not (isinstance(value, bool) or value == "static"):
        raise ValueError(f"must be true, false or static, not {value!r}")
    return value


DescAct = Annotated[bool | Literal["static"], BeforeValidator(_desc_act)]
Damping = Literal["auto", "own", "mean"]
Propagate = Literal["auto", "source", "quantized"]
Outcome = Literal["damp_raised", "dead_columns", "rtn_fallback", "scale_overflow", "scale_underflow", "starved_expert"]


def _expert_tokens(value: Any) -> Any:
    if value != "in_features" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"must be a number of tokens, or in_features, not {value!r}")
    return value


ExpertTokens = Annotated[int | Literal["in_features"], BeforeValidator(_expert_tokens)]
"""Minimum of tokens for an expert's linear. With fewer tokens than inputs its Hessian is singular, and only the damping
determines the directions that no token covers."""


def _known_group_size(value: int, known: tuple[int, ...]) -> int:
    if value not in known:
        nearest = min(known[1:], key=lambda size: abs(size - value))
        raise ValueError(
            f"must be one of {', '.join(map(str, known))} (-1: one group per row), which loaders "
            f"have kernels for, not {value}; the nearest is {nearest}"
        )
    return value


class Strict(BaseModel):
    """Base of every part of the recipe: unknown keys are errors, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineChoice(Strict):
    """The choice between our own solvers and an external engine."""

    engine: str = NATIVE

    @field_validator("engine")
    @classmethod
    def _engine(cls, value: str) -> str:
        if value not in engine_names():
            near = difflib.get_close_matches(value, engine_names(), n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"must be one of {', '.join(engine_names())}, not '{value}'{hint}")
        return value


class Solving(Strict):
    """What both methods leave to the solver; the file format is the same whatever is chosen."""

    damp_percent: float = Field(default=0.1, gt=0, lt=1)
    damping: Damping = "auto"
    """What ``damp_percent`` is a share of: each channel's own diagonal of the Hessian, or the mean of all."""
    mse: bool = True
    """Search for each group's range with the smallest error, weighted as in the solve; AWQ calls it weight clipping."""
    signed_scales: bool = True
    """Let the search turn a symmetric group's grid round by a negative scale."""
    polish: bool = True
    """After the solve, refit scales and improve codes by coordinate descent."""


class GptqParameters(Solving):
    """The parameters of one GPTQ solve, with the names of the loaders and papers."""

    bits: Bits = 4
    group_size: int = Field(default=128, strict=True)
    desc_act: DescAct = False
    act_group_aware: bool = True
    """If ``desc_act`` is false: solve groups, and the columns in them, by activation. The file format is the same."""
    sym: bool = True
    propagate: Propagate = "auto"
    """Activations for the statistics: those of the source model, or of the blocks quantized so far."""

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        if isinstance(value, bool) or value not in BITS:
            raise ValueError(f"must be one of {', '.join(map(str, BITS))}, not {value!r}")
        return value

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        return _known_group_size(value, GROUP_SIZES)


class Named(EngineChoice):
    """A variant is a branch of its method's repo. ``branch`` is always set once a recipe is loaded."""

    branch: str | None = None

    @field_validator("branch")
    @classmethod
    def _branch(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if value.upper() in RESERVED or COMMIT_ID.fullmatch(value):
            raise ValueError(f"{value!r} has another meaning in git; give the branch another name")
        if not BRANCH.fullmatch(value) or ".." in value or value.endswith((".", ".lock")):
            raise ValueError(f"{value!r} is not a valid branch name; use only letters, digits, '.', '_' and '-'")
        return value


class GptqVariant(GptqParameters, Named):
    """One branch of the GPTQ repo."""


class GptqMatrix(Strict):
    """Lists of parameters; every combination becomes a variant."""

    bits: list[int] = Field(default=[], min_length=1)
    group_size: list[int] = Field(default=[], min_length=1)
    desc_act: list[DescAct] = Field(default=[], min_length=1)
    sym: list[bool] = Field(default=[], min_length=1)
    damp_percent: list[float] = Field(default=[], min_length=1)
    damping: list[Damping] = Field(default=[], min_length=1)
    mse: list[bool] = Field(default=[], min_length=1)
    signed_scales: list[bool] = Field(default=[], min_length=1)
    polish: list[bool] = Field(default=[], min_length=1)
    engine: list[str] = Field(default=[], min_length=1)


class Gptq(GptqParameters, EngineChoice):
    """Defaults for all GPTQ variants, the variants, and settings of the whole method."""

    variants: list[GptqVariant] = []
    matrix: GptqMatrix | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    zero_bias: bool = False
    rtn_fallback: bool = False
    min_expert_tokens: ExpertTokens = "in_features"
    fail_on: list[Outcome] = []


class AwqParameters(Solving):
    """The parameters of one AWQ variant, with the names of the loaders and the paper."""

    bits: Literal[4] = 4
    group_size: int = Field(default=128, strict=True)
    zero_point: bool = True
    rounding: Literal["gptq", "nearest"] = "gptq"
    """Rounding of the scaled weights: by GPTQ with the same statistics, or to the nearest code."""

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, value: int) -> int:
        return _known_group_size(value, AWQ_GROUP_SIZES)


class AwqVariant(AwqParameters, Named):
    """One branch of the AWQ repo."""


class AwqMatrix(Strict):
    """Lists of parameters; every combination becomes a variant."""

    group_size: list[int] = Field(default=[], min_length=1)
    zero_point: list[bool] = Field(default=[], min_length=1)
    rounding: list[Literal["gptq", "nearest"]] = Field(default=[], min_length=1)
    mse: list[bool] = Field(default=[], min_length=1)
    engine: list[str] = Field(default=[], min_length=1)


class Awq(AwqParameters, EngineChoice):
    """Defaults for all AWQ variants, the variants, and settings of the whole method."""

    variants: list[AwqVariant] = []
    matrix: AwqMatrix | None = None
    version: Literal["gemm"] = "gemm"
    rtn_fallback: bool = False
    min_expert_tokens: ExpertTokens = "in_features"
    fail_on: list[Outcome | Literal["unscaled"]] = []


def _levels(value: Any) -> Any:
    """Expand a level, a named set, or a list of both to a list of distinct levels."""
    found: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str) or (item not in LEVEL_SETS and item.upper() not in LEVELS):
            near = difflib.get_close_matches(str(item).upper(), LEVELS, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{item!r} is neither a GGUF level nor a set ({', '.join(LEVEL_SETS)}){hint}")
        found += LEVEL_SETS.get(item, (item.upper(),))
    return list(dict.fromkeys(found))


class Gguf(Strict):
    """The GGUF levels: files of one branch, made by llama.cpp's quantizer from one full-width conversion."""

    levels: Annotated[list[str], BeforeValidator(_levels), Field(min_length=1)]
    imatrix: bool | str = True
    """An importance matrix from the calibration pass, none, or one from a GGUF file of llama-imatrix."""
    intermediate: Literal["auto", "F16", "BF16", "F32"] = "auto"
    """Type of the full-width conversion that all levels are quantized from; auto follows the source."""
    tensor_types: dict[str, str] = {}
    """Regex of GGUF tensor names -> type, for all levels."""
    solve: Literal["llama.cpp", "error_feedback"] = "llama.cpp"
    """Who chooses codes and scales: llama.cpp's quantizer, or error feedback under the Hessian of the calibration pass,
    for the types that it knows. Format, types and sizes are the same."""
    max_file_size: Size = 50_000_000_000
    """Larger levels are split into files of at most this size, because the hub accepts no larger ones."""
    nextn: bool = True
    """Whether layers that predict further tokens (NextN, MTP) go into the files, where the model has some."""
    mmproj: bool = True
    """Whether the encoder and projector of a model for images or sound are made too, as a file of their own."""
    logits_tolerance: float = Field(default=0.02, gt=0)
    """Largest allowed mean KL divergence of the conversion from the source, in nats."""

    @field_validator("tensor_types")
    @classmethod
    def _types(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, kind in value.items():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
            if kind.upper() not in TENSOR_TYPES:
                near = difflib.get_close_matches(kind.upper(), TENSOR_TYPES, n=1, cutoff=0.5)
                raise ValueError(
                    f"'{kind}' is not a type of GGUF tensors" + (f"; did you mean {near[0]}?" if near else "")
                )
        return {pattern.lower(): kind.upper() for pattern, kind in value.items()}

    @model_validator(mode="after")
    def _imatrix(self) -> Gguf:
        needing = [level for level in self.levels if LEVELS[level].needs_imatrix]
        if needing and not self.imatrix:
            raise ValueError(f"{', '.join(needing)} cannot be made without an importance matrix; set imatrix: true")
        return self

    @model_validator(mode="after")
    def _solve(self) -> Gguf:
        if self.solve == "error_feedback" and self.imatrix is not True:
            why = (
                "an importance matrix file holds only its diagonal, of another pass"
                if self.imatrix
                else "without an importance matrix there is no such pass"
            )
            raise ValueError(
                f"solve: error_feedback needs the whole Hessian of this recipe's calibration pass, and {why}; set "
                "imatrix: true, or solve: llama.cpp"
            )
        return self


Variant = GptqVariant | AwqVariant
Method = Literal["gptq", "awq"]
METHODS: tuple[Method, ...] = ("gptq", "awq")
"""The methods, in the order in which their repos are shown; each is a section of a recipe."""
