"""An engine's Python environment: created once below a given folder with pinned requirements, and reused.

A virtual environment cannot be moved, so it is created in its final folder; a file written last marks it as complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.engines.engine import Engine
from quantize.engines.installers import CannotInstall, Pip, Uv, find_installer, reason
from quantize.engines.process import run_worker
from quantize.errors import EngineError, EngineRunError
from quantize.files.lock import LockHeld, LocksUnsupported, exclusive_lock
from quantize.reporter import Reporter

MARK = "environment.json"
GPU_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver, without loading a library."""
    return any(path.exists() for path in GPU_FILES) or shutil.which("nvidia-smi") is not None


@dataclass(frozen=True)
class Environment:
    """An engine's environment.

    Attributes:
        root: the folder of all engines' environments.
    """

    engine: Engine
    root: Path

    @property
    def folder(self) -> Path:
        """Its folder, named by the pins: other pins give another environment."""
        return self.root / self.engine.name / self.engine.pins

    @cached_property
    def mark(self) -> dict[str, Any] | None:
        """The record written when it was completed; None if it is missing or incomplete."""
        try:
            data = json.loads((self.folder / MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and Path(str(data.get("python"))).exists() else None

    @property
    def python(self) -> Path:
        """Its interpreter.

        Raises:
            EngineError: it is not installed.
        """
        if self.mark is None:
            raise EngineError(f"{self.engine.title} is not installed; run `{self.how}`")
        return Path(self.mark["python"])

    @property
    def how(self) -> str:
        """The command that installs it."""
        return f"quantize engines install {self.engine.name}"

    @property
    def identity(self) -> dict[str, str]:
        """What the bytes of a result depend on: the engine and its pins or, in the user's own environment, the
        installed packages."""
        own = (self.mark or {}).get("own")
        version = str(self.mark["version"]) if own and self.mark else self.engine.version
        return {"name": self.engine.name, "version": version, "environment": str(own or self.engine.pins)}

    @property
    def nbytes(self) -> int:
        """Its size on disk in bytes."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())

    def obstacle(self, method: str) -> str | None:
        """Why this machine cannot run the engine's ``method`` now, as a sentence without full stop; None if it can."""
        if self.engine.methods[method].needs == "cuda" and not has_gpu():  # type: ignore[index]
            return f"{self.engine.title} needs an NVIDIA GPU with CUDA, and this machine has none"
        if self.mark is None:
            return f"{self.engine.title} is not installed; run `{self.how}`"
        return None

    def install(self, reporter: Reporter, force: bool = False) -> None:
        """Create the environment, unless it is complete.

        Raises:
            EngineError: the packages cannot be installed, or the disk is full; the environment then stays incomplete.
        """
        with self._locked():
            self.__dict__.pop("mark", None)
            if self.mark is not None and not force:
                reporter.say(f"{self.engine.title} is already installed: {self.mark['python']}")
                return
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            log, installer = self.folder / "install.log", find_installer()
            reporter.say(f"{self.engine.title}: creating an environment with {installer.name} in {self.folder}")
            try:
                python = installer.create(Path(os.path.abspath(self.folder / "python")), log)
                self._fill(installer, python, reporter, log)
            except CannotInstall as error:
                raise EngineRunError(
                    f"{self.engine.title}: its environment cannot be created: {error}; see {log}. "
                    f"`{self.how} --python PATH` uses a Python that has the engine"
                ) from None
            except OSError as error:
                raise EngineRunError(
                    f"{self.engine.title}: its environment cannot be created ({error}); see {log}"
                ) from None
            self._write_mark({"python": str(python), "version": self.engine.version, "own": None})
            reporter.say(f"{self.engine.title} is installed: {python}")

    def adopt(self, python: Path, reporter: Reporter) -> None:
        """Use the user's own interpreter, in which the engine is installed.

        Raises:
            EngineError: it cannot run the engine.
        """
        python = Path(os.path.abspath(python.expanduser()))  # not resolved: a link tells Python its environment
        if not python.is_file():
            raise EngineError(f"{python}: this Python interpreter does not exist")
        with self._locked():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            answer = self.ask(python)
            versions = {name: version or "none" for name, version in sorted(answer["packages"].items())}
            own = " ".join(f"{name}=={version}" for name, version in versions.items())
            self._write_mark({"python": str(python), "version": versions[self.engine.package], "own": own})
            reporter.say(f"{self.engine.name} {versions[self.engine.package]} of {python} is used")

    def ask(self, python: Path | None = None) -> dict[str, Any]:
        """Import the engine in its environment and return its answer, with the versions of its packages.

        Raises:
            EngineError: it is not installed, or cannot be imported.
        """
        python = python or self.python
        with (self.folder / "check.log").open("w", encoding="utf-8") as log:
            return run_worker(self.engine, python, {"action": "check"}, log)

    def _fill(self, installer: Pip | Uv, python: Path, reporter: Reporter, log: Path) -> None:
        constraints = Path(os.path.abspath(self.folder / "constraints.txt"))
        constraints.write_text("\n".join(self.engine.constraints.split()) + "\n", encoding="utf-8")
        steps = [["--constraint", str(constraints), *self.engine.requirements]]
        if self.engine.without_dependencies:
            steps.append(["--no-deps", *self.engine.without_dependencies])
        for step in steps:
            named = [word for word in step if "==" in word]
            reporter.say(f"{self.engine.title}: installing {', '.join(named)}")
            if not installer.install(python, step, log):
                raise EngineRunError(
                    f"{self.engine.title}: {installer.name} cannot install it: {reason(log)}; see {log}"
                )

    def _write_mark(self, data: dict[str, Any]) -> None:
        temporary = self.folder / f".{MARK}"
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / MARK)
        self.__dict__.pop("mark", None)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock on installing this engine."""
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(self.root / f"{self.engine.name}.lock"))
            except LockHeld:
                raise EngineRunError(
                    f"{self.engine.title} is being installed by another process; wait for it"
                ) from None
            except LocksUnsupported as error:
                raise EngineRunError(f"{self.root}: cannot be locked on its filesystem: {error}") from None
            except OSError as error:
                raise EngineRunError(f"{self.root}: cannot be written: {error.strerror}") from None
            yield
