"""llama.cpp's converter in forks of the test's process, which has imported torch and transformers already.

Importing them is nine tenths of what the conversion of a tiny model takes. The same worker runs in the same frame, with
the same request, environment, guard and limits; that a real interpreter is started for it is for ``test_children.py``
and for ``built`` of ``test_gguf.py``, which is made before this fixture.
"""

from __future__ import annotations

import itertools
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

ANEW = frozenset({"quantize", "gguf", "conversion"})
"""Packages that the child imports itself: from llama.cpp's tree, or not at all."""


class Forked:
    """What :class:`quantize.files.child.Child` uses of a ``Popen``."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], pass_fds: Sequence[int], **pipes: Any
    ) -> None:
        asked, said = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become(command[-1], cwd, env, {asked[0]: 0, said[1]: 1}, pass_fds)
            finally:
                os._exit(1)
        os.close(asked[0])
        os.close(said[1])
        self.stdin, self.stdout = os.fdopen(asked[1], "wb", 0), os.fdopen(said[0], "rb", 0)

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _become(main: str, cwd: Path, env: Mapping[str, str], pipes: Mapping[int, int], kept: Sequence[int]) -> None:
    """Run a file as ``__main__``, with nothing of pytest around it."""
    os.setsid()
    os.chdir(cwd)
    for pipe, number in pipes.items():
        os.dup2(pipe, number)
    os.dup2(1, 2)
    places = [2, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for last, following in itertools.pairwise(places):
        os.closerange(last + 1, following)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stderr = os.fdopen(1, "w", 1, encoding="utf-8")
    logging.root.handlers.clear()
    warnings.resetwarnings()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    for name in [name for name in sys.modules if name.partition(".")[0] in ANEW]:
        del sys.modules[name]
    runpy.run_path(main, run_name="__main__")


@pytest.fixture
def forked_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize.files import child
    from quantize.gguf import convert

    real = child.run_child
    shim = SimpleNamespace(PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, Popen=Forked)

    def run(task: Any, *rest: Any) -> Any:
        if task.worker.stem != "worker_convert":
            return real(task, *rest)
        with patch.object(child, "subprocess", shim):
            return real(task, *rest)

    if hasattr(os, "fork"):
        monkeypatch.setattr(convert, "run_child", run)
