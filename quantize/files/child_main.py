"""Runs inside every child process; imports nothing of quantize, as it also runs under other tools' interpreters.

One request in JSON arrives on stdin: ``worker``, a Python file whose ``run(arguments)`` is called; ``arguments``;
``path``, folders put before ``sys.path``; ``limits`` by name; ``answer``, the descriptor of a pipe;
``allow_remote_code``. What ``run`` returns goes into the pipe as JSON, so that nothing a library prints can be taken
for it: ``{"value": ...}``, or ``{"error": ..., "kind": ...}``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

REFUSED = "code of the model's own repo is not allowed to run"


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    answer = int(request["answer"])
    os.set_inheritable(answer, False)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _limit(request["limits"])
    sys.path[:0] = request["path"]
    if not request["allow_remote_code"]:
        sys.meta_path.insert(0, _Guard())
    try:
        said = {"value": _load(request["worker"]).run(request["arguments"])}
    except MemoryError:
        said = {"error": "not enough memory", "kind": "MemoryError"}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said = {"error": " ".join(str(error).split()), "kind": type(error).__name__}
    with os.fdopen(answer, "w", encoding="utf-8") as pipe:
        json.dump(said, pipe)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if "error" in said else 0)  # threads and atexit handlers of libraries must not keep it


def _end_with(parent: int) -> None:
    """A child must not go on for hours for a build that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _limit(limits: dict[str, int]) -> None:
    """Lower what the platform can lower; one that knows no such limit goes without."""
    try:
        import resource
    except ImportError:
        return
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):
            continue


def _load(worker: str) -> Any:
    spec = importlib.util.spec_from_file_location("quantize_child_worker", worker)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Guard(importlib.abc.MetaPathFinder):
    """Has transformers refuse code of a model's repo, whatever its callers pass as ``trust_remote_code``.

    Patched while the module is imported, so that whoever imports its functions by name gets the refusing ones.
    """

    MODULE = "transformers.dynamic_module_utils"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def guarded(module: ModuleType) -> None:
                load(module)
                _forbid(module)

            spec.loader.exec_module = guarded  # type: ignore[method-assign]
        return spec


def _forbid(module: Any) -> None:
    decide = getattr(module, "resolve_trust_remote_code", None)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(REFUSED)

    def distrust(trust_remote_code: Any, *args: Any, **kwargs: Any) -> Any:
        # where the library has the class itself, it takes its own; otherwise it refuses
        try:
            return decide(False, *args, **kwargs) if decide else False
        except ValueError:
            raise PermissionError(REFUSED) from None

    for name in (
        "create_dynamic_module", "get_class_in_module", "get_cached_module_file", "get_class_from_dynamic_module",
    ):  # fmt: skip
        setattr(module, name, refuse)
    module.resolve_trust_remote_code = distrust


if __name__ == "__main__":
    main()
