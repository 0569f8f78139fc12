"""This process does the work, one thing after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from quantize.calibration.parts import Part, add_part
from quantize.calibration.states import States
from quantize.errors import SolveError
from quantize.executors.api import Future, Gathered, Job, Solved, Streams, Windows
from quantize.executors.blocks import BlockFuture, BlockJob, solve_block_job
from quantize.executors.quantizers import LocalQuantizers, Quantizers
from quantize.methods.asymmetric import toward_source
from quantize.methods.gptq import solve
from quantize.methods.sums import energy
from quantize.reporter import Reporter


class LocalExecutor:
    """This process, which does one thing after another."""

    def room(self, device: str) -> int:
        return 1

    def streams(self, windows: Windows, reporter: Reporter) -> Streams:
        return LocalStreams(windows, reporter)

    def submit(self, job: Callable[[], Job]) -> Future:
        return lambda: solve_job(job())

    @property
    def ahead(self) -> int:
        return 1

    def submit_blocks(self, job: Callable[[], BlockJob]) -> BlockFuture:
        return lambda: solve_block_job(job())

    def quantizers(self, folders: Sequence[Path], budget: int | None, reporter: Reporter) -> Quantizers:
        return LocalQuantizers(budget)


class LocalStreams:
    """Windows that run in this process, one part after the other."""

    def __init__(self, windows: Windows, reporter: Reporter) -> None:
        self._reporter = reporter
        self._parts = list(self._begin(windows))
        first = self._parts[0].source.states.shape
        self.shape = (sum(len(ids) for ids in windows.parts), *first[1:])

    @staticmethod
    def _begin(windows: Windows) -> Iterator[Part]:
        done = windows.kept.state.next_block
        for number, ids in enumerate(windows.parts):
            if done:
                yield Part.resume(windows.model, ids, windows.batch, windows.states(number, done))
            else:
                yield Part.start(windows.model, ids, windows.batch, windows.places(number))

    def statistics(self, index: int, block: nn.Module, gather: bool, first: bool) -> Gathered:
        sample = self._parts[0].source.first() if first else None
        total, *others = (part.statistics for part in self._parts)
        streams = total(index, block, gather, self._reporter)
        for statistics in others:
            for one, other in zip(streams, statistics(index, block, gather, self._reporter), strict=True):
                add_part(one, other)
        return Gathered(streams, sample)

    def advance(self, index: int, block: nn.Module, stream: int, weights: Mapping[str, torch.Tensor]) -> None:
        for part in self._parts:
            part.advance(index, block, stream, weights)

    def keep(self, next_block: int) -> Mapping[str, str]:
        """They lie there since the block was through."""
        return named_digests(stream.states for part in self._parts for stream in part.streams)

    def close(self) -> None:
        """Nothing is left of them."""


def named_digests(streams: Iterable[States]) -> dict[str, str]:
    """SHA-256 of states as they lie on the disk, by the names of their files."""
    return {states.place.file(states.block).name: states.digest for states in streams if states.place and states.digest}


def solve_job(job: Job, with_energy: bool = True) -> Solved:
    """Solve a job, and where it is asked for compute the energy, which is the same for all branches.

    Raises:
        SolveError: as :func:`solve`.
    """
    with torch.inference_mode():
        weight = job.weight
        if job.drift is not None:
            try:
                (own,) = job.parameters  # a stream of its own is one variant's
                weight = toward_source(weight, job.hessian, job.drift, own.damping)
            except SolveError:
                if not job.rtn_fallback:
                    raise
                # the solve meets the same Hessian, rounds to nearest and says so
        before = energy_of(weight, job.hessian) if with_energy else torch.zeros(0, dtype=torch.float64)
        return Solved(
            solve(weight, job.hessian, job.parameters, rtn_fallback=job.rtn_fallback, row_budget=job.row_budget), before
        )


def energy_of(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(W H W^T) split by the rows of W, [N] float64."""
    return energy(weight, hessian)
