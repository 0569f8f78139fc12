"""Calibration windows in parts that may run in different processes: statistics are sums, so the parts' add up.

Floating-point sums depend on their order. Parts are always added in order, wherever they ran, so the last bits depend
only on the number of parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.calibration.forward import Activations, block_statistics
from quantize.calibration.states import StateFiles, States
from quantize.calibration.statistics import InputStatistics, panels
from quantize.errors import CalibrationError
from quantize.reporter import SILENT, Reporter
from quantize.source.linear import Linear
from quantize.source.streamed import StreamedModel


def cut(ids: NDArray[np.int64], parts: int) -> list[NDArray[np.int64]]:
    """Split windows [samples, length] into contiguous parts of nearly equal size; the first are the larger ones."""
    return np.array_split(ids, parts)


class Part:
    """A part of the windows, with their activations.

    Attributes:
        streams: the source's activations, then those of each branch with activations of its own.
    """

    def __init__(self, streams: Sequence[Activations]) -> None:
        self.streams = list(streams)

    @classmethod
    def start(
        cls, model: StreamedModel, ids: NDArray[np.int64], batch: int, places: Sequence[StateFiles | None]
    ) -> Part:
        """A part at the input of the first block, with one stream for each of ``places``."""
        source = Activations(model, ids, batch, places[0])
        return cls([source, *(source.copy(place.name if place else "") for place in places[1:])])

    @classmethod
    def resume(cls, model: StreamedModel, ids: NDArray[np.int64], batch: int, states: Sequence[States]) -> Part:
        """A part that resumes from ``states``, one for each stream."""
        source = Activations(model, ids, batch, states=states[0])
        return cls([source, *map(source.of, states[1:])])

    @property
    def source(self) -> Activations:
        """The source's activations."""
        return self.streams[0]

    def statistics(
        self, index: int, block: nn.Module, gather: bool, reporter: Reporter = SILENT
    ) -> list[list[InputStatistics]]:
        """Run the source through a block; see :func:`block_statistics`.

        Args:
            gather: collect the source's own statistics too, not only those of the other streams.

        Returns:
            The statistics of each stream.
        """
        source, *others = self.streams
        shared, own = block_statistics(index, block, source, streams=others, gather=gather, reporter=reporter)
        return [shared, *own]

    def advance(self, index: int, block: nn.Module, stream: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Run a stream through the block with other ``weights``, [N, K] by the linear's name in the block."""
        activations = self.streams[stream]
        with torch.inference_mode():
            replaced = [linear for linear in activations.model.linears(block) if linear.local in weights]
            saved = [linear.weight.clone() for linear in replaced]
            for linear in replaced:
                linear.set_weight(weights[linear.local])
            activations.advance(index, block)
            for linear, weight in zip(replaced, saved, strict=True):
                linear.set_weight(weight)


@torch.inference_mode()
def add_part(total: Sequence[InputStatistics], part: Sequence[InputStatistics]) -> None:
    """Add a part's statistics to the ``total`` of the preceding parts, in place.

    Raises:
        CalibrationError: the linears share their inputs differently than in the preceding parts.
    """
    members = [[[linear.local for linear in group.linears] for group in groups] for groups in (total, part)]
    if members[0] != members[1]:
        raise CalibrationError(
            f"{members[0][0][0]}: linears share their inputs differently in different shards; build with --shards 1"
        )
    for one, other in zip(total, part, strict=True):
        if not other.tokens:  # an expert that no token of this part reached; its H is a placeholder
            continue
        if not one.tokens:
            one.hessian, one.drift, one.tokens = other.hessian, other.drift, other.tokens
            continue
        one.hessian += other.hessian
        if one.drift is not None and other.drift is not None:
            one.drift += other.drift
        one.tokens += other.tokens


@dataclass(frozen=True)
class Packed:
    """A tensor as plain bytes for another process: uint8 [nbytes], dtype and shape."""

    data: NDArray[np.uint8]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Packed:
        """Pack a tensor from any device."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> torch.Tensor:
        """Unpack into a new tensor."""
        # in memory allocated by torch: with other row alignment, products may differ in their last bits
        tensor = torch.empty(self.shape, dtype=self.dtype)
        tensor.view(-1).view(torch.uint8).numpy()[:] = self.data
        return tensor


@dataclass(frozen=True)
class PackedStatistics:
    """Statistics of one input for transfer between processes: H's panels up to the diagonal, and the drift."""

    linears: tuple[str, ...]
    size: int
    tokens: int
    panels: tuple[Packed, ...]
    drift: Packed | None

    @classmethod
    def of(cls, group: InputStatistics) -> PackedStatistics:
        """Pack finished statistics."""
        size = group.hessian.shape[0]
        return cls(
            tuple(linear.local for linear in group.linears),
            size,
            group.tokens,
            tuple(Packed.of(group.hessian[first:last, :last]) for first, last in panels(size)),
            None if group.drift is None else Packed.of(group.drift),
        )

    def statistics(self, linears: Sequence[Linear]) -> InputStatistics:
        """Unpack, for a block's ``linears``."""
        by_name = {linear.local: linear for linear in linears}
        hessian = torch.empty(self.size, self.size)
        for (first, last), panel in zip(panels(self.size), self.panels, strict=True):
            hessian[first:last, :last] = panel.tensor()
        drift = None if self.drift is None else self.drift.tensor()
        group = InputStatistics([by_name[name] for name in self.linears], hessian, drift, self.tokens)
        group.finish()
        return group
