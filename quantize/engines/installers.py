"""Create an engine's environment and install packages: with uv if available, else with Python's venv and pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantize.engines.process import SHOWN
from quantize.files.child import computing_environment

_PIP_SOURCES = (
    "INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "TRUSTED_HOST", "CERT", "CLIENT_CERT", "PROXY",
)  # fmt: skip
"""pip's settings for package sources, as spelled in its variables after ``PIP_``."""
_PIP_LINE = re.compile(rf"^\s*({'|'.join(_PIP_SOURCES)})\s*[=:]".replace("_", "[-_]"), re.IGNORECASE | re.MULTILINE)
_UV_SOURCES = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONFIG_FILE")
_NO_NETWORK = (
    "NewConnectionError", "Temporary failure in name resolution", "Network is unr", "dns error", "tcp connect error",
    "client error (Connect)",
)  # fmt: skip


class CannotInstall(Exception):
    """An environment cannot be created. The text says why, and what to do about it."""


@dataclass(frozen=True)
class Pip:
    """Python's venv and pip, which ensurepip puts into the new environment."""

    name = "pip"

    def create(self, folder: Path, log: Path) -> Path:
        """Create an empty environment and return its interpreter.

        Raises:
            CannotInstall: this Python has no pip. OSError: the folder cannot be written.
        """
        venv.create(folder, symlinks=True)
        python = folder / "bin" / "python"
        # -P: the current folder may be an untrusted checkout with a pip.py
        if _logged([str(python), "-P", "-m", "ensurepip", "--upgrade", "--default-pip"], log):
            raise CannotInstall(
                f"{sys.executable} cannot put pip into it (its ensurepip is missing or fails); install uv, or the "
                "system's package for Python's venv (python3-venv on Debian and Ubuntu)"
            )
        return python

    def install(self, python: Path, wanted: list[str], log: Path) -> bool:
        """Install ``wanted``, arguments of ``pip install``; return whether it worked."""
        command = [str(python), "-P", "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
        return not _logged([*command, *wanted], log)


@dataclass(frozen=True)
class Uv:
    """uv, which needs no pip in the environment.

    Attributes:
        program: its absolute path.
    """

    program: str
    name = "uv"

    def create(self, folder: Path, log: Path) -> Path:
        """See :meth:`Pip.create`."""
        if self._run(["venv", "--no-project", "--python", sys.executable, str(folder)], log):
            raise CannotInstall(f"uv cannot create one for {sys.executable}: {reason(log)}")
        return folder / "bin" / "python"

    def install(self, python: Path, wanted: list[str], log: Path) -> bool:
        """See :meth:`Pip.install`."""
        return not self._run(["pip", "install", "--python", str(python), *wanted], log)

    def _run(self, arguments: list[str], log: Path) -> int:
        # from the root: uv reads a uv.toml in the current folder or above, which may be an untrusted checkout
        return _logged([self.program, *arguments], log, Path(log.absolute().anchor))


def find_installer() -> Pip | Uv:
    """uv if it is on the PATH, else pip. Also pip if only pip's settings name package sources: uv ignores them, and
    must not use a public index instead of a private one."""
    program = shutil.which("uv")
    configured = any(os.environ.get(name) for name in _UV_SOURCES)
    return Uv(os.path.abspath(program)) if program and (configured or not _pip_has_sources()) else Pip()


def reason(log: Path) -> str:
    """The installer's error, or that the package index cannot be reached."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if any(word in text for word in _NO_NETWORK):
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
    if not errors and (found := re.search(r"^(?:error: | *× )((?:.+\n?)+)", text, re.MULTILINE)):  # uv's
        said = re.sub(r":?\n\W*(?:cause: |Caused by: |╰─▶ )", ": ", found[1])
        errors = [" ".join(re.sub(r"\n[\s│]*", " ", said).split())]
    return errors[0][:SHOWN].strip() if errors else "it gave no reason"


def _pip_has_sources() -> bool:
    """Whether pip's variables or files name an index, a proxy or certificates."""
    if any(os.environ.get(f"PIP_{name}") for name in _PIP_SOURCES):
        return True
    for path in _pip_files():
        try:
            if _PIP_LINE.search(path.read_text(encoding="utf-8", errors="replace")):
                return True
        except OSError:
            continue
    return False


def _pip_files() -> Iterator[Path]:
    """Where pip looks for its settings, as `pip config debug` lists it."""
    from platformdirs import PlatformDirs

    own = os.environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:  # pip then reads no file at all
        return
    places = PlatformDirs("pip", appauthor=False, roaming=True, multipath=True)
    yield from (Path(folder) / "pip.conf" for folder in places.site_config_dir.split(os.pathsep))
    yield from (Path("/etc/pip.conf"), Path.home() / ".pip" / "pip.conf", Path(places.user_config_dir) / "pip.conf")
    if own:
        yield Path(own)


def _logged(command: list[str], log: Path, folder: Path | None = None) -> int:
    """Run an installer, with network and the user's network settings but no tokens; return its exit code."""
    environment = {**computing_environment(network=True), "HOME": str(Path.home())}  # its cache is there
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder
        ).returncode
