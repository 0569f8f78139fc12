"""llama.cpp's quantizer on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import BuildError
from quantize.executors import ray_tasks
from quantize.executors.ray_tasks import first_line


class RayQuantizers:
    """llama.cpp's quantizer as tasks, on nodes that see the files.

    Args:
        ray: the module. cpus: of each node. get: waits for a task's result. lost: the errors of tasks that were lost.
    """

    def __init__(self, ray: Any, cpus: Sequence[int], get: Callable[[Any], Any], lost: Any) -> None:
        self._ray, self._get, self._lost = ray, get, lost
        self._cpus = [count for count in cpus if count] or [1]
        self._task = ray.remote(ray_tasks.quantize_level)
        self._running: set[Any] = set()

    def lanes(self, count: int) -> tuple[int, int]:
        lanes = max(1, min(sum(self._cpus), count))
        return lanes, max(1, min(sum(self._cpus) // lanes, *self._cpus))

    def run(self, request: Mapping[str, Any], on_line: Callable[[str], None]) -> tuple[int, str]:
        paths = {name: str(Path(request[name]).absolute()) for name in ("source", "target", "imatrix") if request[name]}
        task = self._task.options(num_cpus=request["threads"]).remote({**request, **paths})
        self._running.add(task)
        try:
            code, log = self._get(task)
        except self._lost as error:
            raise BuildError(f"a GGUF level was lost by every Ray worker that tried it: {first_line(error)}") from None
        finally:
            self._running.discard(task)
        for line in log.splitlines(keepends=True):
            on_line(line)
        return code, log

    def stop(self) -> None:
        for task in list(self._running):
            self._ray.cancel(task)
