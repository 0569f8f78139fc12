"""Linears that a checkpoint stores stacked in one tensor, as slices of it. Imports no torch.

A slice looks like a tensor of its own everywhere but where it is read: it has a name, a dtype and a shape, and a branch
stores its quantized form under its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.formats.tensors import TensorSpec


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
