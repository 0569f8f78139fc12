"""What runs in the processes of a Ray cluster. Plain classes and functions: :mod:`ray_workers` makes actors and tasks
of them, so this module imports no ray.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from quantize.calibration.parts import Packed, PackedStatistics, Part
from quantize.calibration.states import StateFiles, States
from quantize.errors import BuildError, DamagedBuild
from quantize.executors.api import Job
from quantize.executors.blocks import BlockJob, BlockRows, solve_block_job
from quantize.executors.local import named_digests, solve_job
from quantize.executors.memory import give_back, return_large_buffers
from quantize.files.versions import versions_of
from quantize.gguf.quantize import finish, start
from quantize.methods.gptq import GptqParameters, Solution
from quantize.source.accelerator import settled
from quantize.source.resolved import Source
from quantize.source.streamed import StreamedModel

PROBE = ".seen-by-ray"


@dataclass(frozen=True)
class Settings:
    """How every process computes. threads: of torch, as on the driver. versions: the driver's."""

    device: str
    threads: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Begin:
    """All that a shard's worker needs.

    Attributes:
        ids: int64 [samples, length]. batch: windows run together.
        places: where the states of each stream lie; None for those of a worker that does not see that folder.
        digests: SHA-256 of the states that lie there.
        block: resume with the states that enter this block; 0 starts anew. width: of the resumed states.
        states: these states, for a worker that does not see the folder.
    """

    settings: Settings
    source: Source
    taken: frozenset[str] | None
    dtype: torch.dtype
    trust_remote_code: bool
    ids: NDArray[np.int64]
    batch: int
    places: Sequence[StateFiles | None]
    digests: Sequence[str | None]
    block: int
    width: int
    states: Sequence[Packed]


class ShardWorker:
    """Runs one shard of the windows, in a process of its own."""

    def sees(self, file: Path, token: str) -> bool:
        """Whether the driver's folder is seen here."""
        return sees(file, token)

    def begin(self, request: Begin) -> int:
        """Read what lies outside the blocks, and take the windows to where the pass stands.

        Returns:
            The width of the hidden states.

        Raises:
            BuildError: as :func:`settle`, or the model or the states cannot be read on this node.
            SourceError, CalibrationError: as in a local build.
        """
        self.settling = contextlib.ExitStack()  # as long as this process lives
        device = self.settling.enter_context(settle(request.settings))
        for name in request.source.checkpoint.shards:
            path = request.source.folder / name
            if not path.is_file():
                raise BuildError(
                    f"{path}: the Ray node {platform.node()} has no such file; the model has to lie at the same place "
                    "on every node"
                )
        self.model = StreamedModel(
            request.source, request.dtype, device, trust_remote_code=request.trust_remote_code, taken=request.taken
        )
        if request.block:
            self.part = Part.resume(self.model, request.ids, request.batch, _restored(request))
        else:
            self.part = Part.start(self.model, request.ids, request.batch, request.places)
        self.model.drop_outside()
        self.loading = contextlib.ExitStack()
        return self.part.source.states.shape[-1]

    def statistics(self, index: int, gather: bool, first: bool) -> tuple[list[list[PackedStatistics]], Packed | None]:
        """As :meth:`Streams.statistics`, of this shard."""
        self.loading.close()
        give_back()
        self.block: nn.Module = self.loading.enter_context(self.model.block(index))
        sample = Packed.of(self.part.source.first()) if first else None
        streams = self.part.statistics(index, self.block, gather)
        return [[PackedStatistics.of(group) for group in groups] for groups in streams], sample

    def advance(self, index: int, stream: int, weights: Mapping[str, Packed]) -> None:
        """As :meth:`Streams.advance`, of this shard, through the block whose statistics it gave last."""
        known = {name: weight.tensor().to(self.model.device) for name, weight in weights.items()}
        self.part.advance(index, self.block, stream, known)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the states of every stream as they lie on the disk, by the names of their files."""
        return named_digests(stream.states for stream in self.part.streams)

    def states(self) -> list[Packed]:
        """The states of every stream as they are now."""
        return [Packed.of(stream.hidden) for stream in self.part.streams]


def _restored(request: Begin) -> list[States]:
    shape, found = (*request.ids.shape, request.width), []
    for number, place in enumerate(request.places):
        if place is None:
            states = States(shape, request.dtype)
            states.whole, states.block = request.states[number].tensor(), request.block
        else:
            try:
                states = States(shape, request.dtype, place, request.block, request.digests[number])
            except OSError as error:
                raise DamagedBuild(
                    f"{place.folder}: this unfinished build cannot be read on the node {platform.node()} ({error}); "
                    "remove it with 'quantize clean' and build again"
                ) from None
        found.append(states)
    return found


@contextlib.contextmanager
def probe(folder: Path) -> Iterator[tuple[Path, str]]:
    """A file in ``folder`` while inside, and what it says, by which :func:`sees` knows the same folder elsewhere."""
    token = secrets.token_hex(16)
    file = folder.absolute() / f"{PROBE}-{token}"
    file.write_text(token, encoding="utf-8")
    try:
        yield file, token
    finally:
        file.unlink(missing_ok=True)


def sees(file: Path, token: str) -> bool:
    """Whether a file that the driver wrote is there, and the very same."""
    try:
        return file.read_text(encoding="utf-8") == token
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def settle(settings: Settings) -> Iterator[torch.device]:
    """While inside, this process computes as the driver does.

    Raises:
        BuildError: this node is of other versions.
    """
    ours = versions()
    if odd := sorted(name for name, version in settings.versions.items() if ours.get(name) != version):
        raise BuildError(
            f"the Ray node {platform.node()} has {odd[0]} {ours.get(odd[0])}, but the machine that builds "
            f"{settings.versions[odd[0]]}; install the same versions on every node"
        )
    return_large_buffers()
    with settled(settings.threads):
        yield torch.device(settings.device)


def first_line(error: Exception) -> str:
    """What an error says, without the log that ray adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def versions() -> dict[str, str]:
    """Of all that decides bytes."""
    return versions_of(("torch", "transformers", "numpy", "numba"))


def pack_solution(solution: Solution) -> dict[str, Any]:
    """A solution whose tensors are packed."""
    values = {field.name: getattr(solution, field.name) for field in fields(solution)}
    return {name: Packed.of(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def unpack_solution(packed: Mapping[str, Any]) -> Solution:
    """The solution again, in memory."""
    values: dict[str, Any] = {name: one.tensor() if isinstance(one, Packed) else one for name, one in packed.items()}
    return Solution(**values)


def solve_packed(
    weight: Packed,
    hessian: Packed,
    drift: Packed | None,
    *,
    parameters: Sequence[GptqParameters],
    rtn_fallback: bool,
    row_budget: int | None,
    with_energy: bool,
    settings: Settings,
) -> tuple[list[dict[str, Any]], Packed]:
    """As :func:`solve_job`."""
    with settle(settings) as place:
        job = Job(
            weight.tensor().to(place),
            hessian.tensor().to(place),
            drift.tensor().to(place) if drift else None,
            parameters,
            rtn_fallback,
            row_budget,
        )
        solved = solve_job(job, with_energy)
        return [pack_solution(solution) for solution in solved.solutions], Packed.of(solved.energy)


def solve_packed_blocks(
    hessian: Packed, parts: Sequence[tuple[str, Packed, NDArray[np.uint8]]], *, settings: Settings
) -> list[tuple[Any, ...]]:
    """As :func:`solve_block_job`; parts: type, weight, and the quantizer's bytes."""
    with settle(settings) as place:

        def rows(kind: str, weight: Packed, first: NDArray[np.uint8]) -> BlockRows:
            # arrays that ray hands over cannot be written to
            return BlockRows(kind, lambda: weight.tensor().to(place), first.copy())

        solved = solve_block_job(BlockJob(hessian.tensor().to(place), [rows(*part) for part in parts]))
        return [
            (one.data, *map(Packed.of, (one.before, one.after, one.energy)), one.rule, one.damp_percent)
            for one in solved
        ]


def quantize_level(request: Mapping[str, Any]) -> tuple[int, str]:
    """Run llama.cpp's quantizer on a request. The file gets its name when it is whole.

    Returns:
        The exit code and the log.
    """
    target = Path(request["target"])
    own = target.with_name(f"{target.name}.{platform.node()}.{os.getpid()}")  # another try may still be writing
    try:
        with start({**request, "target": str(own)}) as child:  # ended where the task is cancelled
            code, log = finish(child)
        if code == 0:
            with own.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(own, target)
        return code, log
    finally:
        own.unlink(missing_ok=True)
