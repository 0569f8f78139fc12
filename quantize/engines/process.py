"""Run an engine's process: a JSON request in, an answer out, its output into a log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from quantize.engines.engine import Engine
from quantize.errors import EngineError, EngineRunError
from quantize.files.child import ChildFailed, Task, run_child
from quantize.files.threads import thread_count

WORKER = Path(__file__).with_name("worker.py")
SHOWN = 300
"""Characters of an engine's message that go into an error."""


def run_worker(engine: Engine, python: Path, request: Mapping[str, Any], log: IO[str]) -> dict[str, Any]:
    """Run one request in an engine's environment.

    Raises:
        EngineError: it failed, was killed or gave no answer; details are in its log.
    """
    threads = str(thread_count())
    arguments = {**request, "tool": str(engine.file), "packages": list(engine.packages), "threads": int(threads)}
    task = Task(
        WORKER, arguments, python, home=Path.home(),  # for the kernels that engines compile and cache
        variables={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        allow_remote_code=bool(request.get("trust_remote_code")), closed=_folders_of(request.get("source")),
        own=(engine.file.parent,), passed=engine.variables,
        pickles=True,  # engines copy their own objects with pickle
    )  # fmt: skip
    try:
        answer: dict[str, Any] = run_child(task, log=log)
    except ChildFailed as error:
        if error.wants_remote_code:
            raise EngineError(
                f"{engine.title} needs code from the model's repo ({error.refused[-1]}), which does not run unless "
                "the recipe says `model.trust_remote_code: true`; read that code first"
            ) from None
        did = f"failed: {error.kind}: " if error.kind else ""
        raise EngineRunError(f"{engine.title} {did}{error.reason}; its log is {log.name}") from None
    except OSError as error:
        raise EngineError(f"{engine.title}: {python} cannot be run: {error.strerror}") from None
    finally:
        log.flush()
    return answer


def _folders_of(source: str | None) -> list[Path]:
    """A source's folder, and the folders that its links point to."""
    if source is None:
        return []
    links = {path.resolve().parent for path in Path(source).rglob("*") if path.is_symlink()}
    return [Path(source), *sorted(links)]
