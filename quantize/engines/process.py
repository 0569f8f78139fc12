"""The engine's process: a request in JSON goes in, an answer comes out, and what it prints goes into a log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from quantize.engines.engine import Engine
from quantize.errors import EngineRunError

WORKER = Path(__file__).with_name("worker.py")
SHOWN = 300
"""Characters of a foreign message that go into an error."""


def run_worker(engine: Engine, python: Path, request: Mapping[str, Any], folder: Path, log: IO[str]) -> dict[str, Any]:
    """Run one request in an engine's environment.

    Args:
        folder: its working directory, which engines like to litter.

    Raises:
        EngineError: it failed, died or gave no answer; its log says more.
    """
    threads = _threads()
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        whole = {**request, "answer": str(answer), "packages": list(engine.packages), "threads": threads}
        done = subprocess.run(
            [str(python), "-I", "-u", str(WORKER), str(engine.file)],
            input=json.dumps(whole), stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder,
            env=_environment(threads),
        )  # fmt: skip
        log.flush()
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            hint = ": the machine may have run out of memory" if name == "SIGKILL" else ""
            raise EngineRunError(f"{engine.title} was killed by {name}{hint}; its log is {log.name}")
        try:
            said: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise EngineRunError(
                f"{engine.title} ended without an answer (exit code {done.returncode}); its log is {log.name}"
            ) from None
        if "error" in said:
            raise EngineRunError(f"{engine.title} failed: {said['error'][:SHOWN]}; its log is {log.name}")
        return said


def _threads() -> int:
    """Of arithmetic: what OMP_NUM_THREADS says, as it does for us, else all cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) else os.cpu_count() or 1


def _environment(threads: int) -> dict[str, str]:
    """Ours without what would lead it to our packages, and without tokens; no hub, no telemetry."""
    withheld = ("PYTHON", "VIRTUAL_ENV", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(withheld)}
    count = str(threads)
    return {
        **kept, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
