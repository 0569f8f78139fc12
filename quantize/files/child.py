"""Child processes for code that is not ours: llama.cpp, other engines, chat templates, loaders.

A child gets a JSON request, a reduced environment without tokens, limits, a home of its own, and a session of its own,
so that ending it ends whatever it started. What it may do to files that the user can write is not restricted: it is a
process with little at hand, not a sandbox.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MAIN = Path(__file__).with_name("child_main.py")
LOG_LINES = 2000
"""Of a child's output, the last that are remembered."""
REASON = 300
"""Characters of somebody else's message that are passed on."""

PASSED = frozenset({
    "PATH", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "CC", "CXX", "LLAMA_CPP_DIR", "PYTHONUTF8", "PYTHONHASHSEED",
})  # fmt: skip
PASSED_PREFIXES = (
    "LC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "CUDA_", "NVIDIA_", "NCCL_",
    "HIP_", "ROCR_", "HSA_", "PYTORCH_", "TORCH_", "TRITON_", "MALLOC_", "GLIBC_", "VLLM_",
)  # fmt: skip
"""Variables that say how to compute and where libraries lie. Nothing else of the user's environment is passed on."""
NETWORK = ("PIP_", "UV_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
           "ALL_PROXY")  # fmt: skip
"""What a package installer needs beside them, in either case."""
SECRET = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "APIKEY", "ACCESS_KEY", "PRIVATE_KEY")


class ChildFailed(Exception):
    """A child did not do its work.

    Attributes:
        reason: its own reason on one line, of at most ``REASON`` characters. kind: name of the exception that it ended
            with, empty where it died. code: exit code, negative for a signal. log: the last lines that it printed.
    """

    def __init__(self, reason: str, kind: str, code: int, log: str) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.code, self.log = reason, kind, code, log

    @property
    def wants_remote_code(self) -> bool:
        """Whether it ended because it wanted to run code of the model's repo."""
        return self.kind == "PermissionError" and "code of the model's own repo" in self.reason


@dataclass(frozen=True)
class Task:
    """What a child shall do.

    Attributes:
        worker: a Python file; its ``run(arguments)`` is called. arguments: plain data.
        python: another interpreter than this one. path: folders that its imports come from first.
        seconds: after which it is ended. limits: by name of :mod:`resource`, such as ``RLIMIT_CPU``.
        allow_remote_code: let transformers run code of a model's repo.
        variables: further environment variables. home: what it takes for the user's home; None is an empty one.
    """

    worker: Path
    arguments: Any
    python: Path | None = None
    path: Sequence[Path] = ()
    seconds: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    allow_remote_code: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    home: Path | None = None


class Child:
    """A running child. ``with`` ends it, and all that it started, on the way out."""

    def __init__(self, task: Task, log: IO[str] | None = None) -> None:
        self.task = task
        self._log, self._lines = log, deque[str](maxlen=LOG_LINES)
        self._scratch = tempfile.TemporaryDirectory(prefix="quantize-child-")
        self._answer = b""
        home = Path(self._scratch.name)
        reader, writer = os.pipe()
        # isolated where the interpreter is another tool's; here PYTHONPATH is left out by the environment
        flags = ["-P"] if task.python is None else ["-I"]
        try:
            self.process = subprocess.Popen(
                [str(task.python or sys.executable), *flags, "-u", str(MAIN)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                errors="replace", cwd=home, env=environment(home, task.home, task.variables), pass_fds=(writer,),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            self._scratch.cleanup()
            raise
        finally:
            os.close(writer)
        self._reader = threading.Thread(target=self._read_answer, args=(reader,), daemon=True)
        self._reader.start()
        request = {
            "worker": str(task.worker), "arguments": task.arguments, "path": [str(folder) for folder in task.path],
            "limits": dict(task.limits), "answer": writer, "allow_remote_code": task.allow_remote_code,
        }  # fmt: skip
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            json.dump(request, pipe)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._reader.join()
        self._scratch.cleanup()

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, told: Callable[[str], None] | None = None) -> Any:
        """Wait for its answer.

        Args:
            told: hears every line that it prints, as it comes.

        Raises:
            ChildFailed: it failed, died or took too long.
        """
        timer = threading.Timer(self.task.seconds, self._out_of_time) if self.task.seconds else None
        self._late = False
        if timer:
            timer.daemon = True
            timer.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                self._lines.append(line)
                if self._log is not None:
                    self._log.write(line)
                if told:
                    told(line)
            code = self.process.wait()
        finally:
            if timer:
                timer.cancel()
        self.kill()  # what it left running holds the pipe
        self._reader.join()
        return self._judge(code)

    @property
    def log(self) -> str:
        """The last lines that it printed."""
        return "".join(self._lines)

    def _out_of_time(self) -> None:
        self._late = True
        self.kill()

    def _read_answer(self, reader: int) -> None:
        with os.fdopen(reader, "rb") as pipe:
            self._answer = pipe.read()

    def _judge(self, code: int) -> Any:
        if self._late:
            raise ChildFailed(f"gave no answer in {self.task.seconds:g} seconds", "", code, self.log)
        try:
            said = json.loads(self._answer)
        except ValueError:
            raise ChildFailed(_death(code, self.log), "", code, self.log) from None
        if "error" in said:
            reason = str(said["error"])[:REASON] or str(said.get("kind"))
            raise ChildFailed(reason, str(said.get("kind")), code, self.log)
        return said["value"]


def run_child(task: Task, told: Callable[[str], None] | None = None, log: IO[str] | None = None) -> Any:
    """Run a child to its end; its answer.

    Args:
        told: hears every line that it prints. log: takes them too.

    Raises:
        ChildFailed: it failed, died or took too long.
    """
    with Child(task, log) as child:
        return child.wait(told)


def environment(scratch: Path, home: Path | None = None, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment: what computing needs, no tokens, no hub, nothing of the user's own.

    Args:
        scratch: an empty folder of the child's own. home: what stands for the user's home; None is ``scratch``.
    """
    none = str(scratch / "none")
    return {
        **computing_environment(),
        "HOME": str(home or scratch), "HF_HOME": str(scratch / "hub"), "HF_TOKEN_PATH": none, "NETRC": none,
        "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        **(variables or {}),
    }  # fmt: skip


def computing_environment(network: bool = False) -> dict[str, str]:
    """The user's variables that say how to compute, and with ``network`` how to reach a package index."""
    prefixes = PASSED_PREFIXES + (NETWORK if network else ())
    return {
        name: value
        for name, value in os.environ.items()
        if (name in PASSED or name.upper().startswith(prefixes)) and not is_secret(name)
    }


def is_secret(name: str) -> bool:
    """Whether a variable's name says that it holds a secret."""
    return any(word in name.upper() for word in SECRET) and not name.startswith("TOKENIZERS_")


@contextmanager
def without_secrets() -> Iterator[None]:
    """Take tokens out of this process's environment while code of a model's repo is in use.

    Its code then finds no token in the environment, and the hub's client none in its file. It is no sandbox: the code
    can still read the user's files.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_secret(name)}
    before = {name: os.environ.get(name) for name in ("HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN")}
    os.environ |= {"HF_TOKEN_PATH": os.devnull, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    constants = sys.modules.get("huggingface_hub.constants")
    path = getattr(constants, "HF_TOKEN_PATH", None)
    if constants is not None:
        constants.HF_TOKEN_PATH = os.devnull  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if constants is not None:
            constants.HF_TOKEN_PATH = path  # type: ignore[attr-defined]
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        os.environ.update(hidden)


def _death(code: int, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = ": the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended without an answer (exit code {code})" + (f": {lines[-1][:REASON]}" if lines else "")
