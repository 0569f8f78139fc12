"""Executor of a Ray cluster (https://docs.ray.io); the only module that imports ray.

Each shard of the windows is run by an actor, which reads the model itself and, if lost, is made anew from the last
states; solves and GGUF levels are tasks. Results are put together in one order, and the driver writes all artefacts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.calibration.forward import choose_device
from quantize.calibration.parts import Packed, add_part
from quantize.calibration.states import States
from quantize.calibration.statistics import InputStatistics
from quantize.errors import BuildError, PlanError, QuantizeError
from quantize.executors import ray_tasks
from quantize.executors.api import Future, Gathered, Job, Solved, Streams, Windows
from quantize.executors.blocks import BlockFuture, BlockJob, SolvedRows
from quantize.executors.local import named_digests
from quantize.executors.quantizers import LocalQuantizers, Quantizers
from quantize.executors.ray_quantizers import RayQuantizers
from quantize.executors.ray_tasks import first_line
from quantize.methods.gptq import Solution
from quantize.reporter import Reporter

ray: Any = import_module("ray")  # an extra: no type checker can count on it

MOST_LOSSES = 3  # of the worker of one shard; more is no accident
ACTOR_GPU, TASK_GPU = 0.51, 0.49  # a shard and a solve share a GPU, two shards never do
LOST: Any = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.NodeDiedError,
)
Call = Callable[[int], tuple[str, tuple[Any, ...]] | None]
"""For the number of a shard the method of its worker and its arguments; None where it is not for that shard."""


@contextlib.contextmanager
def connected(address: str, reporter: Reporter) -> Iterator[RayExecutor]:
    """The workers of a cluster. Nothing of the build is left there afterwards, and a cluster of its own ends.

    Raises:
        BuildError: no cluster is there, or it is of another version.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(address, reporter)
    workers = None
    try:
        workers = RayExecutor(reporter)
        reporter.say(f"Ray: {workers}")
        yield workers
    finally:
        if workers:
            workers.close()
        if ours:
            ray.shutdown()


def _connect(address: str, reporter: Reporter) -> None:
    try:
        try:
            _join(address)
        except ConnectionError:
            if address != "auto":
                raise
            reporter.say("no Ray cluster is running: starting one on this machine for this build")
            _join("local")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise BuildError(
            f"--ray {address}: cannot join a Ray cluster there ({first_line(error)}); start one with "
            "'ray start --head', or use --ray auto"
        ) from None


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)


def _get(reference: Any) -> Any:
    """A result; a worker's error that a user can act on is raised as it was there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, QuantizeError | OSError):
            raise cause from None
        raise


def _settings(device: torch.device) -> ray_tasks.Settings:
    return ray_tasks.Settings(device.type, torch.get_num_threads(), ray_tasks.versions())


class RayExecutor:
    """The nodes of the cluster that this process is connected to."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._threads = reporter, torch.get_num_threads()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._nodes = [node["NodeID"] for node in nodes]
        self._cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        self._gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
        self._solve = ray.remote(ray_tasks.solve_packed)
        self._solve_blocks = ray.remote(ray_tasks.solve_packed_blocks)
        self._tasks: set[Any] = set()
        self._streams: list[RayStreams] = []

    def __str__(self) -> str:
        words = [(len(self._nodes), "node"), (sum(self._cpus), "CPU"), (self._gpus, "GPU")]
        return ", ".join(f"{count} {word}{'s' if count != 1 else ''}" for count, word in words if count)

    def room(self, device: str) -> int:
        cuda = choose_device(device).type == "cuda"
        return max(1, self._gpus if cuda else sum(max(1, cpus // self._threads) for cpus in self._cpus if cpus))

    def streams(self, windows: Windows, reporter: Reporter) -> Streams:
        if windows.model.hands_on:
            raise PlanError("--ray: blocks of this model leave keys and values for later ones; build without it")
        if windows.model.device.type == "cuda" and (shards := len(windows.parts)) > self._gpus:
            raise PlanError(
                f"--shards {shards}: the Ray cluster has {self._gpus} GPUs, and each shard needs one; "
                f"use --shards {self._gpus} or --device cpu"
                if self._gpus
                else "--device cuda: the Ray cluster has no GPU; use --device cpu"
            )
        self._streams.append(RayStreams(windows, self._reporter))
        self._streams[-1].begin()
        return self._streams[-1]

    def submit(self, job: Callable[[], Job]) -> Future:
        """Have the branches of each factorization solved by a task of its own, as :func:`solve` parts them too."""
        one = job()
        batches: dict[Any, list[int]] = {}
        for number, asked in enumerate(one.parameters):
            batches.setdefault(asked.batch_key(one.weight.shape[1]), []).append(number)
        given = (one.weight, one.hessian, one.drift)
        tensors = [None if tensor is None else ray.put(Packed.of(tensor)) for tensor in given]
        device = one.weight.device
        solve = self._solve.options(**self._resources(device, self._threads))
        tasks: list[tuple[list[int], Any]] = []
        common = {"rtn_fallback": one.rtn_fallback, "row_budget": one.row_budget, "settings": _settings(device)}
        for members in batches.values():
            parameters = [one.parameters[number] for number in members]
            task = solve.remote(*tensors, parameters=parameters, with_energy=not tasks, **common)
            self._tasks.add(task)
            tasks.append((members, task))

        def wait() -> Solved:
            solutions: dict[int, Solution] = {}
            energies: list[Packed] = []
            for members, task in tasks:
                packed, energy = self._result(task)
                solutions.update(zip(members, map(ray_tasks.unpack_solution, packed), strict=True))
                energies.append(energy)
            return Solved([solutions[number] for number in range(len(solutions))], energies[0].tensor())

        return wait

    @property
    def ahead(self) -> int:
        return max(1, self._gpus, sum(self._cpus) // self._threads)

    def submit_blocks(self, job: Callable[[], BlockJob]) -> BlockFuture:
        one = job()
        device = one.hessian.device
        solve = self._solve_blocks.options(**self._resources(device, self._threads))
        parts = [(part.kind, Packed.of(part.weight()), part.first) for part in one.parts]
        task = solve.remote(Packed.of(one.hessian), parts, settings=_settings(device))
        self._tasks.add(task)
        return lambda: [
            SolvedRows(data.copy(), before.tensor(), after.tensor(), energy.tensor(), rule, share)
            for data, before, after, energy, rule, share in self._result(task)
        ]

    def quantizers(self, folders: Sequence[Path], budget: int | None, reporter: Reporter) -> Quantizers:
        for folder in folders:
            if not self._is_shared(folder):
                reporter.say(f"GGUF levels are made on this machine: not every Ray node sees {folder}")
                return LocalQuantizers(budget)
        return RayQuantizers(ray, self._cpus, _get, LOST)

    def close(self) -> None:
        """Let nothing of the build run on."""
        for streams in self._streams:
            streams.close()
        for task in self._tasks:
            with contextlib.suppress(Exception):
                ray.cancel(task, force=True)
        self._tasks.clear()

    def _result(self, task: Any) -> Any:
        try:
            return _get(task)
        except LOST as error:  # ray has tried several workers
            raise BuildError(f"a solve was lost by every Ray worker that tried it: {first_line(error)}") from None
        finally:
            self._tasks.discard(task)

    def _resources(self, device: torch.device, threads: int) -> dict[str, Any]:
        if device.type == "cuda":
            return {"num_gpus": TASK_GPU, "num_cpus": 0}
        return {"num_cpus": min(threads, max([1, *self._cpus]))}

    def _is_shared(self, folder: Path) -> bool:
        with ray_tasks.probe(folder) as (probe, token):
            sees = ray.remote(ray_tasks.sees)
            on = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
            answers = [
                sees.options(num_cpus=0, scheduling_strategy=on(node, soft=False)).remote(probe, token)
                for node in self._nodes
            ]
            try:
                return all(map(_get, answers))
            except ray.exceptions.RayError:  # a node that went away
                return False


class RayStreams:
    """Windows whose shards are run by one actor each."""

    def __init__(self, windows: Windows, reporter: Reporter) -> None:
        self._windows, self._reporter = windows, reporter
        self._model = windows.model
        gpu = {"num_gpus": ACTOR_GPU} if self._model.device.type == "cuda" else {}
        # no CPU is set aside for them: while they run no solve does, and the other way round
        self._actor = ray.remote(ray_tasks.ShardWorker).options(num_cpus=0, scheduling_strategy="SPREAD", **gpu)
        count = len(windows.parts)
        self._workers: list[Any] = [None] * count
        self._shared = [False] * count
        self._losses = [0] * count
        self._calls: list[Call] = []  # since the states that lie in the driver's folder
        self._block = windows.kept.state.next_block
        shape = windows.kept.state.shape
        self.shape: tuple[int, ...] = shape or (sum(map(len, windows.parts)), windows.parts[0].shape[1], 0)

    def begin(self) -> None:
        """Have every shard taken to where the pass stands.

        Raises:
            BuildError: a node cannot read the model, or is of other versions.
        """
        # AWQ tries its scales on a batch of this size, here
        self._model.embed(torch.from_numpy(self._windows.parts[0][: self._windows.batch]))
        self._workers = [self._actor.remote() for _ in self._workers]
        with ray_tasks.probe(self._windows.kept.folder) as (probe, token):
            seen = [worker.sees.remote(probe, token) for worker in self._workers]
            begun = []
            for number, answer in enumerate(seen):
                try:
                    begun.append(self._begin(number, answer))
                except LOST as error:
                    begun.append(self._anew(number, error))
        for number, reference in enumerate(begun):
            self.shape = (*self.shape[:2], self._result(number, reference))

    def statistics(self, index: int, block: nn.Module, gather: bool, first: bool) -> Gathered:
        linears, sample = self._model.linears(block), None
        total: list[list[InputStatistics]] = []
        for packed, batch in self._all(lambda number: ("statistics", (index, gather, first and number == 0))):
            streams = [[one.statistics(linears) for one in groups] for groups in packed]
            if not total:
                total, sample = streams, batch
                continue
            for one, other in zip(total, streams, strict=True):
                add_part(one, other)
        device = self._model.device
        for group in (group for groups in total for group in groups):
            group.hessian = group.hessian.to(device)
            group.drift = None if group.drift is None else group.drift.to(device)
        return Gathered(total, sample.tensor().to(device) if sample else None)

    def advance(self, index: int, block: nn.Module, stream: int, weights: Mapping[str, torch.Tensor]) -> None:
        packed = ray.put({name: Packed.of(weight) for name, weight in weights.items()})
        list(self._all(lambda number: ("advance", (index, stream, packed))))

    def keep(self, next_block: int) -> Mapping[str, str]:
        """Fetch the states of those workers that do not see the folder where they belong."""
        digests: dict[str, str] = {}
        results = list(self._all(lambda number: ("digests" if self._shared[number] else "states", ())))
        for number, found in enumerate(results):
            if isinstance(found, dict):
                digests |= found
                continue
            for place, one in zip(self._windows.places(number), found, strict=True):
                states = States(one.shape, one.dtype, place)
                states.whole, states.block = one.tensor(), next_block - 1
                states.turn()
                digests |= named_digests([states])
        self._calls.clear()
        self._block = next_block
        return digests

    def close(self) -> None:
        for worker in filter(None, self._workers):
            with contextlib.suppress(Exception):
                ray.kill(worker)
        self._workers = []

    def _all(self, call: Call) -> Iterator[Any]:
        """Have every worker do something; the results in the shards' order."""
        self._calls.append(call)
        references = [self._submit(number, call) for number in range(len(self._workers))]
        for number, reference in enumerate(references):
            yield None if reference is None else self._result(number, reference)

    def _submit(self, number: int, call: Call) -> Any:
        found = call(number)
        return None if found is None else getattr(self._workers[number], found[0]).remote(*found[1])

    def _result(self, number: int, reference: Any) -> Any:
        while True:
            try:
                return _get(reference)
            except LOST as error:
                reference = self._anew(number, error)

    def _anew(self, number: int, loss: Exception) -> Any:
        """Another worker in the place of one that was lost, taken to where that was.

        Returns:
            A reference to the result of the last call.
        """
        while True:
            self._losses[number] += 1
            which = f"the Ray worker of shard {number + 1} of {len(self._workers)}"
            if self._losses[number] > MOST_LOSSES:
                raise BuildError(
                    f"{which} was lost {self._losses[number]} times, the last time with: {first_line(loss)}; the "
                    "finished blocks are kept, so see to its node and build again"
                ) from None
            self._reporter.say(f"{which} was lost; a new one goes on from block {self._block}")
            with contextlib.suppress(Exception):
                ray.kill(self._workers[number])
            worker = self._workers[number] = self._actor.remote()
            try:
                with ray_tasks.probe(self._windows.kept.folder) as (probe, token):
                    reference = self._begin(number, worker.sees.remote(probe, token))
                    _get(reference)
            except LOST as error:
                loss = error
                continue
            for call in self._calls:
                reference = self._submit(number, call) or reference
            return reference

    def _begin(self, number: int, seen: Any) -> Any:
        """Tell a worker where to begin, when it has said whether it sees the driver's folder."""
        windows = self._windows
        shared = self._shared[number] = bool(_get(seen))
        if windows.spilled and not shared:
            raise PlanError(
                "--memory: hidden states have to lie in files, but not every Ray node sees "
                f"{windows.kept.folder}; allow more memory, or use a --dist that all nodes share"
            )
        # a worker has another working directory
        places = [replace(place, folder=place.folder.absolute()) for place in windows.places(number)]
        states = [] if shared or not self._block else windows.states(number, self._block)
        request = ray_tasks.Begin(
            settings=_settings(self._model.device),
            source=self._model.source.for_other_processes(),
            taken=self._model.taken,
            dtype=self._model.compute_dtype,
            trust_remote_code=windows.trust_remote_code,
            ids=windows.parts[number],
            batch=windows.batch,
            places=places if shared else [None] * len(places),
            digests=windows.digests(number, self._block),
            block=self._block,
            width=self.shape[-1],
            states=[Packed.of(one.whole) for one in states],
        )
        return self._workers[number].begin.remote(request)
