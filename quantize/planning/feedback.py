"""Which tensors of a GGUF level are solved with error feedback, and which stay llama.cpp's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantize.formats.ggml_blocks import BLOCK_TYPES
from quantize.gguf.convert import Header
from quantize.gguf.quantize import Outcome
from quantize.gguf.vectors import inputs_of
from quantize.planning.memory import input_of
from quantize.planning.modules import LinearSpec, ModuleTable

FEEDBACK_VERSION = 1
"""Raise it when error feedback gives other bytes for the same Hessian and levels, the solver apart, which has a version
of its own: such levels become stale."""
PLAIN = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})
"""Types that are not quantized."""
NO_STATISTICS = "the calibration pass has no Hessian of its input"
NO_BLOCKS = "its rows are not made of whole blocks"


@dataclass(frozen=True)
class Target:
    """A tensor of a level that is solved.

    Attributes:
        kind: its type. shape: in the row-major order of torch. inputs: for each of its matrices, the linears of the
            checkpoint whose input it multiplies; several if it is made of several that share one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[str, ...], ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        layout, values = BLOCK_TYPES[self.kind], 1
        for length in self.shape:
            values *= length
        return values // layout.size * layout.nbytes


@dataclass(frozen=True)
class Feedback:
    """The tensors of a level.

    Attributes:
        targets: those that are solved. left: why others that are quantized stay llama.cpp's, by name.
    """

    targets: tuple[Target, ...]
    left: Mapping[str, str]

    @cached_property
    def linears(self) -> frozenset[str]:
        """The linears of the checkpoint whose inputs' Hessians are needed."""
        return frozenset(name for one in self.targets for names in one.inputs for name in names)


def feedback_of(
    outcome: Outcome, header: Header, shapes: Mapping[str, tuple[int, ...]], table: ModuleTable
) -> Feedback:
    """Divide a level's tensors.

    Args:
        outcome: their types. shapes: of the tensors, in the row-major order of torch.
    """
    widths = {linear.name: linear.in_features for linear in table.linears}
    targets, left = [], {}
    for name, kind in outcome.types.items():
        shape = shapes.get(name, ())
        if kind in PLAIN:
            if name in outcome.fallbacks:
                left[name] = NO_BLOCKS
        elif kind not in BLOCK_TYPES:
            left[name] = f"error feedback does not know the type {kind}"
        elif (inputs := inputs_of(name, header.made_of.get(name, ()), shape, widths)) is None:
            left[name] = NO_STATISTICS
        elif shape[-1] % BLOCK_TYPES[kind].size:
            left[name] = NO_BLOCKS
        else:
            targets.append(Target(name, kind, shape, inputs))
    return Feedback(tuple(targets), left)


def grouped(left: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of tensors by the reason why they stay llama.cpp's."""
    found: dict[str, list[str]] = {}
    for name, reason in left.items():
        found.setdefault(reason, []).append(name)
    return found


def disk_bytes(levels: Sequence[Feedback], linears: Sequence[LinearSpec]) -> int:
    """Disk space for the Hessians, and for what is solved, until all levels are in their places."""
    needed = frozenset[str]().union(*(one.linears for one in levels))
    inputs = {(one.block, *input_of(one)): one.in_features for one in linears if one.name in needed}
    solved = {(one.name, one.kind): one.nbytes for level in levels for one in level.targets}
    return sum(map(packed_bytes, inputs.values())) + sum(solved.values())


def packed_bytes(size: int) -> int:
    """Upper bound for a Hessian of [size, size] whose panels up to the diagonal are saved."""
    return size * size * 4 * 7 // 12 + size * 4 * 96
