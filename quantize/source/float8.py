"""Which tensors of a checkpoint are float8, and what scales them. Imports no torch.

FP8 releases (DeepSeek, MiniMax, Qwen, Ministral) store a matrix of float8 numbers and, beside it, the factor of each
block of it as ``<name>_scale_inv``. Everywhere but where it is read, such a matrix is one tensor of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quantize.errors import SourceError
from quantize.formats.tensors import TensorSpec

Block = tuple[int, int]
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
SCALES = "_scale_inv"
"""End of the name of a tensor of factors, after the name of the matrix."""
USUAL = (128, 128)
_OTHERS = ("_scale", "_scale_2", ".scale", ".scales", "_scales")
"""Ends of names, after a matrix's or its module's, under which other formats store factors that are not read here."""
_OF_INPUTS = ("input_scale", "activation_scale")
"""Factors of activations, which belong to the quantized form alone."""


@dataclass(frozen=True)
class Float8:
    """How a float8 tensor is read.

    Attributes:
        scales: name of the tensor of factors; empty if the numbers stand for themselves.
        block: rows and columns that share a factor.
    """

    scales: str = ""
    block: Block = (1, 1)


def find_float8(
    tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str
) -> tuple[dict[str, Float8], frozenset[str]]:
    """How each float8 tensor is read, and the names of the tensors that belong to their quantized form alone.

    Raises:
        SourceError: the factors are stored in a form that is not read.
    """
    found: dict[str, Float8] = {}
    beside: set[str] = set()
    for name, spec in tensors.items():
        if spec.dtype in FLOAT8:
            found[name] = _read_as(name, tensors, config, where)
            module = name.removesuffix(".weight")
            beside |= {found[name].scales, *(f"{module}.{end}" for end in _OF_INPUTS), f"{name}_{_OF_INPUTS[1]}"}
    return found, frozenset(beside & tensors.keys())


def _read_as(name: str, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str) -> Float8:
    scales, shape = f"{name}{SCALES}", tensors[name].shape
    if scales in tensors:
        block = _block(shape, tensors[scales].shape, _configured(config))
        if block is None:
            raise SourceError(
                f"{where}: {scales} has the shape {list(tensors[scales].shape)}, which fits no blocks of {name}, "
                f"{list(shape)}; name the unquantized model instead"
            )
        return Float8(scales, block)
    module = name.removesuffix(".weight")
    other = next((one + end for one in (name, module) for end in _OTHERS if one + end in tensors), None)
    if other is not None:
        raise SourceError(
            f"{where}: {name} is float8 with factors in {other}, a form that is not read; "
            "name the unquantized model instead"
        )
    return Float8()


def _configured(config: Mapping[str, Any]) -> Block | None:
    settings = config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, dict) else None
    whole = isinstance(block, list) and len(block) == 2 and all(isinstance(one, int) and one > 0 for one in block)
    return (block[0], block[1]) if whole and block else None


def _block(shape: tuple[int, ...], scales: tuple[int, ...], configured: Block | None) -> Block | None:
    """The block of which factors of this shape have one each; None if there is none."""
    if len(shape) < 2:
        return (1, prod(shape)) if prod(scales) == 1 else None
    rows, columns = shape[-2:]
    if prod(scales) == 1:
        return rows * prod(shape[:-2]), columns
    if prod(scales) == prod(shape[:-1]):
        return 1, columns
    for block in (configured, USUAL):
        if block and tuple(scales) == (*shape[:-2], -(-rows // block[0]), -(-columns // block[1])):
            return block
    return None
