"""Linears that a checkpoint stores stacked in one tensor, as slices of it. Imports no torch.

A slice looks like a tensor of its own everywhere but where it is read: it has a name, a dtype and a shape, and a branch
stores its quantized form under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantize.formats.tensors import TensorSpec

if TYPE_CHECKING:
    from quantize.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Slice:
    """A matrix [out_features, in_features], or a bias [out_features], inside a stacked tensor.

    Attributes:
        stored: the stacked tensor's name. index: of its first dimension, the expert.
        transposed: whether matrices are stacked as [in_features, out_features].
        start, step, count: which of the outputs: ``count`` of them from ``start`` on, every ``step``-th.
        shape: of the slice. scales: name of the tensor of shared exponents, if the stacked one is MXFP4 blocks.
    """

    stored: str
    index: int
    transposed: bool
    start: int
    step: int
    count: int
    shape: tuple[int, ...]
    scales: str = ""

    @classmethod
    def of(cls, row: list[Any]) -> Slice:
        """From plain data."""
        stored, index, transposed, start, step, count, shape, scales = row
        return cls(stored, index, transposed, start, step, count, tuple(shape), scales)

    def spec(self, stored: TensorSpec) -> TensorSpec:
        """The slice as a tensor of its own."""
        return TensorSpec("BF16" if self.scales else stored.dtype, self.shape, stored.file)


def with_slices(checkpoint: Checkpoint, slices: Mapping[str, Slice]) -> Checkpoint:
    """The same checkpoint with slices in place of the tensors that they are taken from."""
    if checkpoint.slices or not slices:
        return checkpoint
    parts: dict[str, list[str]] = {}
    for name, one in slices.items():
        parts.setdefault(one.stored, []).append(name)
    hidden = {one.scales for one in slices.values()}
    tensors = {}
    for name, spec in checkpoint.tensors.items():
        for part in parts.get(name, ()):
            tensors[part] = slices[part].spec(spec)
        if name not in parts and name not in hidden:
            tensors[name] = spec
    return replace(checkpoint, tensors=tensors, slices=slices, stored=checkpoint.tensors)
