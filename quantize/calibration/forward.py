"""The streamed pass: run every block once over all windows, and collect the statistics of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.calibration.states import StateFiles, States
from quantize.calibration.statistics import Collector, InputStatistics
from quantize.errors import CalibrationError, NotFiniteError
from quantize.reporter import SILENT, Reporter
from quantize.source.calls import HandedOn
from quantize.source.processor import forward_dtype
from quantize.source.streamed import StreamedModel


class Activations:
    """Hidden states of all windows, carried from block to block, [samples, length, width].

    Args:
        model: the streamed model. ids: int64 [samples, length]. batch: windows run at a time.
        place: the states' files; None holds them in memory only.
        states: states of an interrupted pass to resume.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: NDArray[np.int64],
        batch: int,
        place: StateFiles | None = None,
        states: States | None = None,
    ) -> None:
        self.model, self.batch = model, batch
        self.ids = torch.from_numpy(ids)
        self._extent = torch.zeros((), dtype=torch.float64)
        self._handed_on: dict[int, HandedOn] = {}
        if states is not None:
            self.states = states
            for count in {min(batch, len(ids)), len(ids) % batch} - {0}:
                model.embed(self.ids[:count])  # records the block calls for this batch size
            return
        for window in self.windows():
            hidden = model.embed(self.ids[window])
            if window.start == 0:
                self.states = States((*ids.shape, hidden.shape[-1]), hidden.dtype, place)
            self.states.write(window, hidden)
        self.states.turn()

    @property
    def hidden(self) -> torch.Tensor:
        """All states; only available if they are in memory."""
        return self.states.whole

    @hidden.setter
    def hidden(self, states: torch.Tensor) -> None:
        self.states.whole = states

    def of(self, states: States) -> Activations:
        """Activations of the same windows with other ``states``."""
        other = copy.copy(self)
        other.states = states
        other._handed_on = {start: one.copy() for start, one in self._handed_on.items()}
        return other

    def copy(self, name: str = "copy") -> Activations:
        """An independent copy; if the states have files, the copy's files get another ``name``."""
        return self.of(self.states.copy(name))

    def windows(self) -> Iterator[slice]:
        """The batches of windows, as slices."""
        for start in range(0, len(self.ids), self.batch):
            yield slice(start, start + self.batch)

    def first(self) -> torch.Tensor:
        """A copy of the first batch's current states, for trials of the next block."""
        self.model.lend(self.handed_on(slice(0, self.batch)))
        return self.states.read(slice(0, self.batch)).to(self.model.device, copy=True)

    def run(self, index: int, block: nn.Module, window: slice) -> torch.Tensor:
        """The block's output for a batch; the states are not changed."""
        states = self.states.read(window).to(self.model.device)
        return self.model.run(index, block, states, self.ids[window], self.handed_on(window))

    def handed_on(self, window: slice) -> HandedOn:
        """What blocks left for later blocks, for a batch."""
        return self._handed_on.setdefault(window.start, HandedOn())

    def put(self, window: slice, output: torch.Tensor) -> None:
        """Store a block's output for a batch."""
        low, high = torch.aminmax(output)  # they carry NaN and infinity, which persist in a sum
        self._extent = self._extent.to(output.device) + (high.double() - low.double())
        self.states.write(window, output)

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the states by the outputs of block ``index``.

        Raises:
            CalibrationError: an output is NaN or infinite.
        """
        for window in self.windows():
            self.put(window, self.run(index, block, window))
        self.turn(index)

    def turn(self, index: int) -> None:
        """Make the outputs of block ``index``, now complete, the current states.

        Raises:
            CalibrationError: an output is NaN or infinite.
        """
        if not bool(torch.isfinite(self._extent)):
            raise NotFiniteError(
                f"{self.model.block_prefix}{index}: its output contains NaN or infinity; "
                "the weights are damaged, or the compute dtype is too narrow (calibration.compute_dtype: float32)"
            )
        self._extent = torch.zeros((), dtype=torch.float64)
        self.states.turn(flush=index + 1 < len(self.model))


def block_statistics(
    index: int,
    block: nn.Module,
    source: Activations,
    *,
    streams: Sequence[Activations] = (),
    gather: bool = True,
    reporter: Reporter = SILENT,
) -> tuple[list[InputStatistics], list[list[InputStatistics]]]:
    """Run all windows through a block and collect the statistics of its distinct inputs.

    ``source`` advances to the block's outputs. The ``streams``, activations of quantized models over the same
    windows, do not: their statistics are taken with the block's present weights, including the drift from the
    source's inputs.

    Args:
        gather: collect the source's own statistics too, not only those of the streams.

    Returns:
        The source's statistics (empty without ``gather``), and those of each stream.

    Raises:
        CalibrationError: no token reached a linear outside experts, or an output is NaN or infinite.
    """
    linears = source.model.linears(block)
    watch = Collector(linears, reporter, gather=gather, record=bool(streams))
    collectors = [Collector(linears, reporter, source=watch) for _ in streams]
    with torch.inference_mode():
        for window in source.windows():
            with watch.attached():
                output = source.run(index, block, window)
            for stream, collector in zip(streams, collectors, strict=True):
                with collector.attached():
                    stream.run(index, block, window)
            source.put(window, output)
        source.turn(index)
        for collector in (watch, *collectors):
            collector.finish()
    if unread := watch.unread():
        raise CalibrationError(f"{source.model.block_prefix}{index}.{unread[0]}: no calibration token reached it")
    return watch.groups, [collector.groups for collector in collectors]


def choose_device(asked: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        CalibrationError: cuda was requested but is not available.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass, by the rule of :func:`quantize.source.processor.forward_dtype`."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[forward_dtype(asked, device.type)]
