"""Which linears of the blocks are quantized, and what stays in 16 bits for which reason.

Loaders quantize linears in whole words of 32 bits, and expect routers and gates as they are. The rules below look at
shapes and at the counts of heads in the config; a recipe's ``quantize.skip`` and ``quantize.only`` come first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from quantize.errors import PlanError
from quantize.formats.tensors import TensorSpec
from quantize.recipe.quantized import Quantized
from quantize.source.anatomy import ROUTER, UNREACHED, Anatomy, Found
from quantize.source.checkpoint import Checkpoint
from quantize.source.routing import find_routers

SKIPPED = "the recipe says so (quantize.skip)"
NOT_ASKED_FOR = "the recipe does not ask for it (quantize.only)"
UNREAD_EXPERTS = {
    "gpt_oss": "GPTQModel 7.6.0 loads them and answers with something else; vLLM was not tried",
    "granitemoe": "GPTQModel 7.6.0 loads them and answers with something else; vLLM was not tried",
}
"""Mixtures that checkpoints store stacked, and whose quantized experts no loader is known to read: what was tried on
2026-11-25 (`quantize verify` of tiny models). A type begins with one of these names."""
NO_LINEAR = "not stored as a linear of its own"
OUTSIDE = "outside the blocks"
SMALLEST = 32
"""Outputs below which a linear is a gate; it would save nothing."""

_PROJECTION = re.compile(
    r"(^|[._])(q|k|v|o|qkv|kv|qk|z|in|out|up|down|gate_up|dense|query|key|value|query_key_value|w[1-3qkvo]|wqkv|c_attn"
    r"|c_proj|c_fc|fc[12]|fc_in|fc_out|proj)(_[ab])?(_proj)?(_with_mqa)?$"
)
"""Last parts of names of ordinary projections: a loader fuses some of them, and takes those only alike."""


@dataclass(frozen=True)
class Left:
    """What stays in the source's dtype.

    Attributes:
        name: of a module in the checkpoint, or of a tensor that no module of its own has. parameters: of its weight.
        block: that it is in; None if outside.
    """

    name: str
    reason: str
    parameters: int
    block: int | None = None


@dataclass(frozen=True)
class Split:
    """The linears to quantize, and what stays."""

    taken: tuple[Found, ...]
    left: tuple[Left, ...]


def split_linears(checkpoint: Checkpoint, anatomy: Anatomy, asked: Quantized) -> Split:
    """Decide for every linear of the blocks.

    Raises:
        PlanError: a pattern of the recipe matches no linear, or forces one that no format can hold.
    """
    _check_patterns(anatomy, asked)
    routers, heads = find_routers(checkpoint.tensors), set(_head_counts(checkpoint.config))
    taken, reasons = [], {}
    for found in anatomy.linears:
        if reason := found.reason or _reason(checkpoint, found, asked, heads):
            reasons[f"{found.name}.weight"] = reason
        else:
            taken.append(found)
    covered = {f"{found.name}.weight" for found in taken}
    outside = set(anatomy.towers)
    left = []
    for name, spec in checkpoint.tensors.items():
        block = anatomy.inside.get(name)
        counts = _is_weight(spec) or name in reasons or name in routers
        if name in covered or not counts or (block is None and name not in outside):
            continue
        reason = reasons.get(name) or (ROUTER if name in routers else NO_LINEAR if block is not None else OUTSIDE)
        left.append(Left(name.removesuffix(".weight"), reason, prod(spec.shape), block))
    unread = f"{anatomy.model_class} of transformers does not read it"
    left += [
        Left(name.removesuffix(".weight"), unread, prod(checkpoint.tensors[name].shape))
        for name in anatomy.unread
        if name.endswith(".weight") and _is_weight(checkpoint.tensors[name])
    ]
    return Split(tuple(taken), tuple(left))


def unread_experts(checkpoint: Checkpoint, asked: Quantized) -> str | None:
    """Why no loader could use a branch of this mixture; None if one may, or the recipe insists."""
    if not checkpoint.slices or asked.unread_experts:
        return None
    return next((why for kind, why in UNREAD_EXPERTS.items() if checkpoint.model_type.startswith(kind)), None)


def _is_weight(spec: TensorSpec) -> bool:
    """Whether a tensor holds matrices of real numbers.

    Vectors, kernels of convolutions along the text, and tables of indices do not.
    """
    return len(spec.shape) >= 2 and min(spec.shape[-2:]) > 1 and spec.dtype.startswith(("F", "BF"))


def share_quantized(taken: int, left: Sequence[Left]) -> float:
    """The part of the blocks' weights that is quantized; ``taken`` is the number of quantized parameters.

    Parts of blocks that text alone does not reach do not count, as towers do not: no text can calibrate them.
    """
    whole = taken + sum(one.parameters for one in left if one.block is not None and one.reason != UNREACHED)
    return taken / whole if whole else 0.0


def grouped(left: Sequence[Left]) -> list[dict[str, Any]]:
    """What stays, with the numbers of blocks and experts in its names replaced by N, as plain data."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in left:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "N", one.name)
        row = found.setdefault(
            (name, one.reason),
            {"name": name, "reason": one.reason, "count": 0, "parameters": 0, "in_blocks": one.block is not None},
        )
        row["count"] += 1
        row["parameters"] += one.parameters
    return list(found.values())


def _reason(checkpoint: Checkpoint, found: Found, asked: Quantized, heads: set[int]) -> str:
    if _matches(found.name, asked.skip):
        return SKIPPED
    forced = _matches(found.name, asked.only)
    if asked.only and not forced:
        return NOT_ASKED_FOR
    shape = checkpoint.tensors[f"{found.name}.weight"].shape
    outputs, inputs = reversed(shape) if found.transposed else shape
    unfit = ""
    if inputs % 32:
        unfit = f"{inputs} inputs do not fill words of 32 bits"
    elif outputs % 8:
        unfit = f"{outputs} outputs do not fill words of 32 bits"
    if unfit and forced:
        raise PlanError(f"quantize.only: {found.name} cannot be quantized: {unfit}")
    if unfit or forced:
        return unfit
    if outputs < SMALLEST:
        return f"a gate with {outputs} outputs"
    if (outputs in heads or outputs / 2 in heads) and not _PROJECTION.search(found.local):
        return f"a gate with {outputs} outputs, as many as heads"
    return ""


def _check_patterns(anatomy: Anatomy, asked: Quantized) -> None:
    names = [found.name for found in anatomy.linears]
    for key, patterns in (("skip", asked.skip), ("only", asked.only)):
        for pattern in patterns:
            if not any(_matches(name, (pattern,)) for name in names):
                example = names[0] if names else "none"
                raise PlanError(
                    f"quantize.{key}: '{pattern}' matches no linear of this model's blocks; their names are such as "
                    f"{example}"
                )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """A pattern is compared with the whole name, and with its end after a dot."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def _head_counts(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            if "vision" not in str(key) and "audio" not in str(key):
                yield from _head_counts(value)
        elif (str(key).endswith("heads") or key == "n_head") and isinstance(value, int):
            yield value
