"""Who does the work of a pass: this process, or others that it sends parts of it to.

A pass asks for three things: statistics of a block, solves, GGUF levels. What comes back does not depend on who did
it, nor on when it was ready.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from quantize.calibration.parts import Part, add_part
from quantize.calibration.states import Place, States
from quantize.calibration.statistics import InputStatistics, Timed
from quantize.errors import SolveError
from quantize.methods.asymmetric import toward_source
from quantize.methods.gptq import GptqParameters, Solution, solve
from quantize.pipeline.quantizers import Children, Quantizers
from quantize.pipeline.unfinished import Unfinished
from quantize.source.resolved import Notify
from quantize.source.streamed import StreamedModel


@dataclass(frozen=True)
class Gathered:
    """What running a block gave.

    Attributes:
        streams: statistics of each stream, the source's first. entered: the first batch that entered the block, as
            the source has it, where it was asked for.
    """

    streams: list[list[InputStatistics]]
    entered: torch.Tensor | None


@dataclass(frozen=True)
class Windows:
    """The calibration windows of a pass, and where they go on from.

    Attributes:
        parts: token ids, int64 [samples, length] each. batch: windows run together. streams: how many.
        kept: how far they have come; their states lie in its folder. spilled: and only there.
    """

    model: StreamedModel
    parts: Sequence[np.ndarray]
    batch: int
    streams: int
    kept: Unfinished
    spilled: bool
    trust_remote_code: bool

    def places(self, part: int) -> list[Place]:
        """Where the states of a part lie, one for each stream."""
        return [Place(self.kept.folder, f"states-{part}-{stream}", self.spilled) for stream in range(self.streams)]

    def states(self, part: int, block: int) -> list[States]:
        """The kept states of a part that enter ``block``, one for each stream.

        Raises:
            BuildError: they cannot be read.
        """
        shape = (len(self.parts[part]), *self.kept.state.shape[1:])
        try:
            return [States(shape, self.model.compute_dtype, place, block) for place in self.places(part)]
        except OSError as error:
            raise self.kept.damaged(error) from None


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

    def keep(self, next_block: int) -> None:
        """See to it that the states that enter ``next_block`` lie in the folder of what is unfinished."""

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
    wishes: Sequence[GptqParameters]
    rtn_fallback: bool
    row_budget: int | None


@dataclass(frozen=True)
class Solved:
    """A solution for each wish of a job; energy: tr(W H W^T) split by the rows of W, [N] float64."""

    solutions: list[Solution]
    energy: torch.Tensor


Wait = Callable[[], Solved]
"""Waits for a job; raises SolveError where it cannot be done."""


class Workers(Protocol):
    """Those who do the work."""

    def room(self, device: str) -> int:
        """How many parts of the windows they can run side by side on ``auto``, ``cpu`` or ``cuda``."""

    def streams(self, windows: Windows, timed: Timed) -> Streams:
        """Send windows on their way."""

    def start(self, job: Callable[[], Job]) -> Wait:
        """Have a job done, now or when it is waited for; ``job`` is called once, when it is begun."""

    def quantizers(self, folders: Sequence[Path], budget: int | None, notify: Notify) -> Quantizers:
        """Those who make GGUF levels out of files in ``folders``, here within ``budget`` bytes of memory."""


class Here:
    """This process, which does one thing after another."""

    def room(self, device: str) -> int:
        return 1

    def streams(self, windows: Windows, timed: Timed) -> Streams:
        return LocalStreams(windows, timed)

    def start(self, job: Callable[[], Job]) -> Wait:
        return lambda: solve_job(job())

    def quantizers(self, folders: Sequence[Path], budget: int | None, notify: Notify) -> Quantizers:
        return Children(budget)


def solve_job(job: Job, with_energy: bool = True) -> Solved:
    """Solve a job, and where it is asked for compute the energy, which is the same for all branches.

    Raises:
        SolveError: as :func:`solve`.
    """
    with torch.inference_mode():
        weight = job.weight
        if job.drift is not None:
            try:
                weight = toward_source(weight, job.hessian, job.drift)
            except SolveError:
                if not job.rtn_fallback:
                    raise
                # the solve meets the same Hessian, rounds to nearest and says so
        energy = energy_of(weight, job.hessian) if with_energy else torch.zeros(0, dtype=torch.float64)
        return Solved(solve(weight, job.hessian, job.wishes, job.rtn_fallback, row_budget=job.row_budget), energy)


def energy_of(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(W H W^T) split by the rows of W, [N] float64."""
    return ((weight @ hessian) * weight).sum(dim=1, dtype=torch.float64).cpu()


class LocalStreams:
    """Windows that run in this process, one part after the other."""

    def __init__(self, windows: Windows, timed: Timed) -> None:
        self._timed = timed
        self._parts = list(self._begin(windows))
        first = self._parts[0].source.states.shape
        self.shape = (sum(len(ids) for ids in windows.parts), *first[1:])

    @staticmethod
    def _begin(windows: Windows) -> Iterator[Part]:
        done = windows.kept.state.next_block
        for number, ids in enumerate(windows.parts):
            if done:
                yield Part.going_on(windows.model, ids, windows.batch, windows.states(number, done))
            else:
                yield Part.at_start(windows.model, ids, windows.batch, windows.places(number))

    def statistics(self, index: int, block: nn.Module, gather: bool, first: bool) -> Gathered:
        entered = self._parts[0].source.first() if first else None
        total, *others = (part.statistics for part in self._parts)
        streams = total(index, block, gather, self._timed)
        for statistics in others:
            for one, other in zip(streams, statistics(index, block, gather, self._timed), strict=True):
                add_part(one, other)
        return Gathered(streams, entered)

    def advance(self, index: int, block: nn.Module, stream: int, weights: Mapping[str, torch.Tensor]) -> None:
        for part in self._parts:
            part.advance(index, block, stream, weights)

    def keep(self, next_block: int) -> None:
        """They lie there since the block was through."""

    def close(self) -> None:
        """Nothing is left of them."""


@contextlib.contextmanager
def open_workers(address: str | None, notify: Notify) -> Iterator[Workers]:
    """This process where ``address`` is None, else the workers of a Ray cluster there; ``auto`` is a running one, or
    one on this machine for the time being.

    Raises:
        BuildError: Ray is not installed, or there is no such cluster.
    """
    if address is None:
        yield Here()
        return
    from quantize.pipeline.ray_workers import connected

    with connected(address, notify) as workers:
        yield workers
