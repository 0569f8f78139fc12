"""Runs inside every child process; imports nothing of quantize, as it also runs under other tools' interpreters.

One request in JSON arrives on stdin: ``worker``, a Python file whose ``run(arguments)`` is called; ``arguments``;
``path``, folders put before ``sys.path``; ``limits`` by name; ``answer``, the descriptor of a pipe;
``allow_remote_code``. What ``run`` returns goes into the pipe as JSON, so that nothing a library prints can be taken
for it: ``{"value": ...}``, or ``{"error": ..., "kind": ..., "refused": [...]}``. The other keys: ``imports``, what
``sys.path`` becomes, or null; ``parent``, the process that this one ends with; and for code of a model's repo, which is
refused without ``allow_remote_code``: ``closed``, folders that it may lie in, ``own`` and ``generated``, such that it
does not, and ``pickles``, whether pickled objects are read all the same.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from typing import Any

REMOTE = "transformers.dynamic_module_utils"


def main() -> None:
    request: dict[str, Any] = json.load(sys.stdin)
    answer = int(request["answer"])
    os.set_inheritable(answer, False)
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    _limit(request["limits"])
    if request["imports"] is not None:
        sys.path[:] = request["imports"]
    sys.path[:0] = request["path"]
    refused: list[str] = []
    try:
        if not request["allow_remote_code"]:
            guard(request, refused)
        text, failed = json.dumps({"value": _load(request["worker"]).run(request["arguments"])}), False
    except MemoryError:
        text, failed = json.dumps({"error": "not enough memory", "kind": "MemoryError"}), True
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said = {"error": " ".join(str(error).split()), "kind": type(error).__name__, "refused": refused}
        text, failed = json.dumps(said), True
    with os.fdopen(answer, "w", encoding="utf-8") as pipe:
        pipe.write(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)  # threads and atexit handlers of libraries must not keep it


def _end_with(parent: int) -> None:
    """A child must not go on for hours for a build that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)  # and all that was started here


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


class RemoteCodeError(ValueError):
    """Code that came with a model was about to run."""


def guard(request: dict[str, Any], refused: list[str]) -> None:
    """Refuse to run Python code, load libraries or read pickled objects from anywhere but the installed packages.

    Python itself tells us of every piece of code before it runs, however it was found; nothing that comes later in
    this process can take that away. transformers is made to answer as with ``trust_remote_code=False``, whatever its
    callers say.

    Args:
        refused: takes what was refused.
    """
    roots = {sys.prefix, sys.base_prefix, sys.exec_prefix, request["generated"], os.path.dirname(request["worker"])}
    roots.update(sysconfig.get_paths().values(), sys.path, request["own"])
    for name, module in list(sys.modules.items()):  # packages that are installed in editable mode
        if name.startswith("__editable__"):
            for place in getattr(module, "MAPPING", {}).values():
                roots.add(os.path.dirname(place))
    allowed = _folders(roots)
    closed = _folders(request["closed"])
    known: dict[str, bool] = {}

    def is_ours(path: str) -> bool:
        folder = os.path.dirname(path)
        if folder not in known:
            places = (os.path.abspath(folder) + os.sep, os.path.realpath(folder) + os.sep)
            known[folder] = all(_deepest(place, allowed) > _deepest(place, closed) for place in places)
        return known[folder]

    def is_the_models(path: str) -> bool:
        places = (os.path.abspath(path), os.path.realpath(path))
        return any(_deepest(place, closed) >= max(1, _deepest(place, allowed)) for place in places)

    def refuse(what: str) -> None:
        refused.append(what)
        raise RemoteCodeError(f"{what} came with the model and is not run")

    def hook(event: str, arguments: Any) -> None:
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            # code that was generated has no file: <string>, <template>
            if not name.startswith("<") and (os.sep in name or os.path.exists(name)) and not is_ours(name):
                refuse(os.path.basename(name))
        elif event in {"import", "ctypes.dlopen"}:
            # native code: kernels that tools compile for themselves lie anywhere
            name = arguments[event == "import"]
            if isinstance(name, str) and os.sep in name and is_the_models(name):
                refuse(os.path.basename(name))
        elif event == "pickle.find_class" and not request["pickles"]:
            refuse(f"a pickled {arguments[0]}.{arguments[1]}")

    sys.addaudithook(hook)
    sys.meta_path.insert(0, _Distrust(refuse))


def _folders(paths: Any) -> tuple[str, ...]:
    """Absolute paths of folders, as they are named and as they are, each with a separator at its end."""
    found = set()
    for path in paths:
        if path:
            found |= {os.path.abspath(path), os.path.realpath(path)}
    return tuple(sorted(path.rstrip(os.sep) + os.sep for path in found))


def _deepest(place: str, folders: tuple[str, ...]) -> int:
    """Length of the longest of the folders that a place is in: of an allowed and a closed one the inner one counts."""
    return max((len(folder) for folder in folders if place.startswith(folder)), default=0)


class _Distrust:
    """Changes transformers' module for remote code as soon as it is loaded, before anybody can import from it."""

    def __init__(self, refuse: Any) -> None:
        self._refuse = refuse

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != REMOTE:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self and hasattr(finder, "find_spec") else None
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                loader.exec_module = functools.partial(self._execute, loader.exec_module)
                return spec
        return None

    def _execute(self, execute: Any, module: Any) -> None:
        execute(module)
        self._change(module)

    def _change(self, module: Any) -> None:
        refuse = self._refuse

        def resolve(
            trust: Any, name: Any, has_local: Any = False, has_remote: Any = False, *_: Any, **named: Any
        ) -> Any:
            # where the library has the class itself, it takes its own
            if named.get("has_remote_code", has_remote) and not named.get("has_local_code", has_local):
                refuse(os.path.basename(str(name).rstrip(os.sep)))
            return False

        def run(name: Any = "", *more: Any, **options: Any) -> Any:
            refuse(os.path.basename(str(name)))

        if hasattr(module, "resolve_trust_remote_code"):
            module.resolve_trust_remote_code = resolve
        for name in ("get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module", "check_imports"):
            if hasattr(module, name):
                setattr(module, name, run)


if __name__ == "__main__":
    main()
