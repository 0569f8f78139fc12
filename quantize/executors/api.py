"""Who does the work of a pass: this process, or others that it sends parts of it to.

A pass asks for three things: statistics of a block, solves, GGUF levels. What comes back does not depend on who did
it, nor on when it was ready.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.calibration.states import StateFiles, States
from quantize.calibration.statistics import InputStatistics
from quantize.dist.resume import Unfinished
from quantize.executors.blocks import BlockFuture, BlockJob
from quantize.executors.quantizers import Quantizers
from quantize.methods.gptq import GptqParameters, Solution
from quantize.reporter import Reporter
from quantize.source.streamed import StreamedModel


@dataclass(frozen=True)
class Gathered:
    """What running a block gave.

    Attributes:
        streams: statistics of each stream, the source's first. sample: the first batch that entered the block, as
            the source has it, where it was asked for.
    """

    streams: list[list[InputStatistics]]
    sample: torch.Tensor | None


@dataclass(frozen=True)
class Windows:
    """The calibration windows of a pass, and where they resume from.

    Attributes:
        parts: token ids, int64 [samples, length] each. batch: windows run together. streams: how many.
        kept: how far they have come; their states lie in its folder. spilled: and only there.
    """

    model: StreamedModel
    parts: Sequence[NDArray[np.int64]]
    batch: int
    streams: int
    kept: Unfinished
    spilled: bool
    trust_remote_code: bool

    def places(self, part: int) -> list[StateFiles]:
        """Where the states of a part lie, one for each stream."""
        return [StateFiles(self.kept.folder, f"states-{part}-{stream}", self.spilled) for stream in range(self.streams)]

    def states(self, part: int, block: int) -> list[States]:
        """The kept states of a part that enter ``block``, one for each stream.

        Raises:
            DamagedBuild: they cannot be read, or are not what was written.
        """
        shape, dtype = (len(self.parts[part]), *self.kept.state.shape[1:]), self.model.compute_dtype
        places, digests = self.places(part), self.digests(part, block)
        try:
            return [States(shape, dtype, place, block, digest) for place, digest in zip(places, digests, strict=True)]
        except OSError as error:
            raise self.kept.damaged(error) from None

    def digests(self, part: int, block: int) -> list[str | None]:
        """SHA-256 of the kept states of a part that enter ``block``, one for each stream."""
        return [self.kept.states_digest(place.file(block).name) for place in self.places(part)]


class Streams(Protocol):
    """All windows on their way through the blocks: the source's states, and those of each drifting branch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all states of one stream, [samples, length, width]."""

    def statistics(self, index: int, block: nn.Module, gather: bool, first: bool) -> Gathered:
        """Run the source through a block, and gather the statistics of every stream over all windows.

        Args:
            gather: gather the source's own too. first: give the first batch that entered the block.
        """

    def advance(self, index: int, block: nn.Module, stream: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Send a stream through the block as it is with other weights, by the linear's name in the block."""

    def keep(self, next_block: int) -> Mapping[str, str]:
        """See to it that the states that enter ``next_block`` lie in the folder of what is unfinished.

        Returns:
            SHA-256 of their files, by file name.
        """

    def close(self) -> None:
        """The pass is over."""


@dataclass(frozen=True)
class Job:
    """The linears that read one input, stacked, to be solved for several branches.

    Attributes:
        weight: [N, K] float32. hessian: [K, K]. drift: [K, K] where the weight shall lean towards the source.
        row_budget: bytes of the weight, of all variants, that are worked on together; None suits the device.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    drift: torch.Tensor | None
    parameters: Sequence[GptqParameters]
    rtn_fallback: bool
    row_budget: int | None


@dataclass(frozen=True)
class Solved:
    """A solution for each set of parameters of a job; energy: tr(W H W^T) split by the rows of W, [N] float64."""

    solutions: list[Solution]
    energy: torch.Tensor


Future = Callable[[], Solved]
"""Gives the result of a job, after waiting for it; raises SolveError where it cannot be done."""


class Executor(Protocol):
    """Those who do the work."""

    def room(self, device: str) -> int:
        """How many parts of the windows they can run side by side on ``auto``, ``cpu`` or ``cuda``."""

    def streams(self, windows: Windows, reporter: Reporter) -> Streams:
        """Send windows on their way."""

    def submit(self, job: Callable[[], Job]) -> Future:
        """Schedule a job; it runs now or when its result is requested. ``job`` is called once, when it starts."""

    @property
    def ahead(self) -> int:
        """How many jobs of :meth:`submit_blocks` to schedule before waiting for the first."""

    def submit_blocks(self, job: Callable[[], BlockJob]) -> BlockFuture:
        """Schedule rows of GGUF tensors; as :meth:`submit`."""

    def quantizers(self, folders: Sequence[Path], budget: int | None, reporter: Reporter) -> Quantizers:
        """Those who make GGUF levels out of files in ``folders``, here within ``budget`` bytes of memory."""
