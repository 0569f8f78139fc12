"""Read slices of stacked tensors; see :mod:`quantize.source.slices`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from quantize.source.slices import Slice

HELD = 4
"""Stacked tensors in memory: those of one block's experts, whose slices are read in turn."""
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the codes of FP4 (OCP Microscaling Formats 1.0); two codes lie in a byte, the first in its low half."""


class StackedTensors:
    """Reads slices; holds the last stacked tensors.

    Args:
        read: reads a stored tensor by name.
    """

    def __init__(self, read: Callable[[str], torch.Tensor]) -> None:
        self._read, self._held, self._lock = read, OrderedDict[str, torch.Tensor](), threading.Lock()

    def take(self, one: Slice) -> torch.Tensor:
        """A slice, contiguous, [out_features, in_features] or [out_features]; MXFP4 is dequantized exactly."""
        part = self._whole(one.stored)[one.index]
        if one.scales:
            part = from_mxfp4(part, self._whole(one.scales)[one.index])
        elif one.transposed and part.dim() == 2:
            part = part.t()
        return part[one.start :: one.step][: one.count].contiguous()

    def _whole(self, name: str) -> torch.Tensor:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            tensor = self._held[name] = self._read(name)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            return tensor


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize uint8 [rows, groups, 16], exponents uint8 [rows, groups], to bfloat16 [rows, groups * 32], exactly."""
    table = torch.tensor(MXFP4)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = torch.ldexp(table[codes], scales.to(torch.int32)[..., None] - 127)
    return values.flatten(-2).to(torch.bfloat16)
