"""Runs a command as a child and reports its wall time and peak memory."""

from __future__ import annotations

import os
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
    with tempfile.TemporaryDirectory() as scratch:
        peak = Path(scratch) / "peak"
        launcher = [sys.executable, "-S", str(Path(__file__).with_name("peak.py")), str(peak)]
        start = time.perf_counter()
        done = subprocess.run(
            [*launcher, sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-15:])
            raise RuntimeError(f"{' '.join(arguments)[:200]} failed:\n{last}")
        return Run(seconds, int(peak.read_text()), done.stdout)
