"""Runs a command as a child and reports its wall time and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

THREADS = str(os.cpu_count() or 1)


@dataclass(frozen=True)
class Run:
    """Wall seconds, peak resident bytes, and what the child printed on stdout."""

    seconds: float
    peak_bytes: int
    output: str


def run(*arguments: str, settings: dict[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run ``python ARGUMENTS`` with pinned threads; a peer that litters its working directory does so in ``cwd``.

    Raises:
        RuntimeError: the child failed; its last lines are the message.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": THREADS,
        "MKL_NUM_THREADS": THREADS,
        "NUMBA_NUM_THREADS": THREADS,
        **(settings or {}),
        "GPTQMODEL_CPU_WORKERS": THREADS,
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )
    errors: list[str] = []
    drain = threading.Thread(target=lambda: errors.extend(child.stderr or []))
    drain.start()
    output = child.stdout.read() if child.stdout else ""
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    drain.join()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:200]} failed:\n{''.join(errors[-15:])}")
    return Run(seconds, usage.ru_maxrss * 1024, output)
