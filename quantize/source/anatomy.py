"""What transformers makes of a checkpoint, as plain data: blocks, linears and names. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantize.formats.tensors import TensorSpec
from quantize.source.slices import Slice

ROUTER = "router of experts"
"""Why a router stays as it is."""
UNREACHED = "text alone does not reach it"
"""Why a part that only images or sound reach stays as it is, like a vision tower."""


@dataclass(frozen=True)
class Found:
    """A linear of a block.

    Attributes:
        name: in the checkpoint, without ``.weight``. local: in its block.
        transposed: whether its weight is stored [in_features, out_features].
        reason: why it has to stay as it is; empty if it can be quantized.
    """

    name: str
    block: int
    local: str
    transposed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a checkpoint.

    Attributes:
        model_class: of transformers. blocks: how many there are. prefix: their names in the checkpoint begin with it.
        linears: of all blocks, in block order. inside: the block of every tensor that belongs to one.
        unread: tensors that the model does not read. towers: tensors of linears outside the text model's blocks, as of
            a vision tower. outside: shortest names of modules that hold such linears, in the checkpoint and in
            transformers. slices: linears that are stored stacked in one tensor. is_renamed: whether
            transformers has the blocks below another name than the checkpoint.
    """

    model_class: str
    blocks: int
    prefix: str
    linears: tuple[Found, ...]
    inside: Mapping[str, int]
    unread: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    slices: Mapping[str, Slice] = field(default_factory=dict)
    is_renamed: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Anatomy:
        """From plain data."""
        linears = tuple(Found(*row) for row in data["linears"])
        names = {key: tuple(data[key]) for key in ("unread", "towers", "outside")}
        slices = {name: Slice.of(row) for name, row in data["slices"].items()}
        return cls(**{**data, **names, "linears": linears, "slices": slices})

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        slices = {name: list(asdict(one).values()) for name, one in self.slices.items()}
        return {**asdict(self), "linears": [list(asdict(one).values()) for one in self.linears], "slices": slices}


def table_of(tensors: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Tensor specs from [dtype, shape] rows."""
    return {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
