"""What must hold of a ``quantize-manifest.json`` for anything here to go by it. A manifest may come from anybody.

Only what is read again is described; other keys pass. Names of files stay inside their folder, texts are one line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from quantize.errors import shortened
from quantize.formats.names import is_file_name
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

SCHEMA = 1
MOST_TEXT = 20_000
"""Characters of a name, as of a module or a calibration text."""


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("leads out of its folder")
    return name


def _text(text: str) -> str:
    if len(text) > MOST_TEXT or not text.isprintable():
        raise ValueError(f"is not one line of at most {MOST_TEXT:,} characters")
    return text


FileName = Annotated[str, AfterValidator(_file_name)]
Text = Annotated[str, AfterValidator(_text)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Part):
    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Module(_Part):
    module: Text
    outcome: Text
    dead_columns: Count | None = None
    relative_error: float | None = None
    weight_error: float | None = None
    scale_folded_into: Text | None = None


class _Left(_Part):
    name: Text
    reason: Text
    count: Count
    parameters: Count
    in_blocks: bool


class _SourceQuality(_Part):
    perplexity: float
    perplexity_error: float


class _Verdict(_Part):
    within_bounds: bool
    bound: float | None = None
    reason: Text | None = None


class _Quality(_Part):
    key: Text
    text: Text
    tokens: Count
    sequence_length: Count
    on_calibration_text: bool
    source: _SourceQuality
    noise_floor: float | None = None
    perplexity: float | None
    perplexity_error: float | None = None
    kl_divergence: float | None
    kl_error: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None
    verdict: _Verdict | None = None


class _Engine(_Part):
    name: Text
    version: Text
    environment: Text
    python: Text
    packages: dict[Text, Text | None]


class _Made(_Part):
    key: Text | None = None
    key_inputs: dict[str, Any] = {}
    files: dict[FileName, _File] = {}
    quality: _Quality | None = None
    fallbacks: list[Text] = []
    tensor_types: dict[Text, Text] = {}


class _Manifest(_Made):
    schema_: Literal[1] = Field(alias="schema")
    engine: _Engine | None = None
    ledger: list[_Module] = []
    left: list[_Left] = []
    share_quantized: Annotated[float, Field(ge=0, le=1)] | None = None
    imatrix: _Made | None = None
    levels: dict[Text, _Made] = {}
    loads_in: dict[Text, Text] = {}


def problem(data: Any) -> str | None:
    """Why a manifest is not valid, in one line; None for a valid one."""
    try:
        _Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = shortened(".".join(map(str, first["loc"])), 200)
        return f"{place}: {first['msg']}" if place else first["msg"]
    return None
