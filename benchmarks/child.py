"""Runs a command as a child and reports its wall time and peak memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
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


def run(
    *arguments: str, settings: dict[str, str] | None = None, cwd: Path | None = None, limit: float | None = None
) -> Run:
    """Run ``python ARGUMENTS`` with pinned threads; a peer that litters its working directory does so in ``cwd``.

    Raises:
        RuntimeError: the child failed; its last lines are the message.
        TimeoutError: it took more than ``limit`` seconds, and was stopped.
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
    with tempfile.TemporaryDirectory() as scratch:
        peak = Path(scratch) / "peak"
        launcher = [sys.executable, "-S", str(Path(__file__).with_name("peak.py")), str(peak)]
        start = time.perf_counter()
        child = subprocess.Popen(
            [*launcher, sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = child.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)  # its children, too
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{' '.join(arguments)[:200]} was stopped after {limit:.0f} s") from None
            raise
        seconds = time.perf_counter() - start
        if child.returncode:
            last = "\n".join(errors.splitlines()[-15:])
            raise RuntimeError(f"{' '.join(arguments)[:200]} failed:\n{last}")
        return Run(seconds, int(peak.read_text()), output)
