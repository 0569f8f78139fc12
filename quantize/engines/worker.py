"""Child process in an engine's own environment. Imports nothing from quantize.

Keys of the arguments: ``tool``, the engine's file; ``packages``, whose versions are reported; ``action``, ``check`` or
``run``. For ``run`` the engine's file is executed and its ``run(request)`` called, with ``source`` (a checkpoint's
folder), ``ids`` (a ``.npy`` of token ids, int64 [samples, length]), ``out`` (an empty folder for the result),
``method``, ``parameters``, ``device`` and ``threads``. Its output is the log; its return value is answered as ``said``.
"""

from __future__ import annotations

import platform
import random
import resource
import time
from importlib import metadata, util
from typing import Any


def run(request: dict[str, Any]) -> dict[str, Any]:
    spec = util.spec_from_file_location("quantize_engine_tool", request["tool"])
    assert spec
    assert spec.loader
    tool = util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    answer: dict[str, Any] = {"python": platform.python_version(), "packages": _versions(request["packages"])}
    if request["action"] == "check":
        answer["said"] = tool.check()
        return answer
    _prepare(request)
    start = time.perf_counter()
    answer["said"] = tool.run(request)
    answer["seconds"] = time.perf_counter() - start
    answer["peak_bytes"] = _peak_bytes()
    return answer


def _peak_bytes() -> int:
    """Peak memory of this process alone; getrusage starts with the size of the parent process."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _prepare(request: dict[str, Any]) -> None:
    """Seed random numbers and set threads; resolve the device ``auto`` to the GPU if the engine's torch sees one.

    Torch takes a second to import, and an engine without it has no use for that."""
    random.seed(0)
    if "torch" not in request["packages"]:
        return
    try:
        import numpy
        import torch
    except ImportError:
        return
    if request["device"] == "auto":
        request["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(request["threads"])


def _versions(packages: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
