"""Child processes for code that is not ours: llama.cpp, other engines, chat templates, loaders.

A child gets a JSON request, a reduced environment without tokens, limits, a home of its own, and a session of its own,
so that ending it ends whatever it started. What it may do to files that the user can write is not restricted: it is a
process with little at hand, not a sandbox.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MAIN = Path(__file__).with_name("child_main.py")
LOG_LINES = 2000
"""Of a child's output, the last that are remembered."""
LONGEST_LINE = 8 * 2**10
"""Bytes of a line that are looked at; progress bars end theirs with a carriage return."""
MOST_ANSWER = 256 * 2**20
REASON = 300
"""Characters of somebody else's message that are passed on."""

PASSED = frozenset({
    "PATH", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "CC", "CXX", "CPATH", "LIBRARY_PATH", "MAX_JOBS",
    "XDG_CACHE_HOME", "RAYON_NUM_THREADS",
})  # fmt: skip
PASSED_PREFIXES = (
    "LC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "VECLIB_", "NUMEXPR_", "CUDA_", "NVIDIA_", "NCCL_",
    "CUBLAS_", "CUDNN_", "HIP_", "ROCR_", "ROCM_", "HSA_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "NUMBA_",
    "MALLOC_", "GLIBC_", "GGML_", "VLLM_", "GPTQMODEL_",
)  # fmt: skip
"""Variables that say how to compute and where libraries lie. Nothing else of the user's environment is passed on."""
NETWORK = ("PIP_", "UV_", "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
           "ALL_PROXY", "NETRC", "XDG_CONFIG_", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "CMAKE_")  # fmt: skip
"""What a package installer needs beside them, in either case."""
SECRET = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|APIKEY|COOKIE|(^|_)(PASS|KEY|KEYS|AUTH|PAT|DSN)(_|$)"
    r"|^(AWS|AZURE|GOOGLE|GITHUB|GH|GITLAB|WANDB|OPENAI|ANTHROPIC)_"
)
NO_SECRETS = frozenset({"HF_HUB_DISABLE_IMPLICIT_TOKEN"})
LOGIN = re.compile(r"://[^/@\s]+@")
"""In an address: a user and mostly a password, which only package installers are on_line."""


class ChildFailed(Exception):
    """A child did not do its work.

    Attributes:
        reason: its own reason on one line, of at most ``REASON`` characters. kind: name of the exception that it ended
            with, empty where it died. code: exit code, negative for a signal. log: the last lines that it printed.
        refused: code of the model's repo that was about to run in it and did not, by file name.
    """

    def __init__(self, reason: str, kind: str, code: int, log: str, refused: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.code, self.log, self.refused = reason, kind, code, log, tuple(refused)

    @property
    def wants_remote_code(self) -> bool:
        """Whether it failed after it had wanted to run code of the model's repo, whatever it then made of that."""
        return bool(self.refused)


@dataclass(frozen=True)
class Task:
    """What a child shall do.

    Attributes:
        worker: a Python file; its ``run(arguments)`` is called. arguments: plain data.
        python: another interpreter than this one. path: folders that its imports come from first.
        seconds: after which it is ended. limits: by name of :mod:`resource`, such as ``RLIMIT_CPU``.
        allow_remote_code: run code of a model's repo. Otherwise no Python code but that of installed packages runs.
        closed: the model's folders, from which none comes even where they lie among installed packages.
        own: folders whose code runs beside that of installed packages.
        pickles: read pickled objects all the same, as by tools that talk so to processes of their own.
        variables: further environment variables. passed: patterns of the user's variables that are passed on too.
        home: what it takes for the user's home; None is an empty one.
    """

    worker: Path
    arguments: Any
    python: Path | None = None
    path: Sequence[Path] = ()
    seconds: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    allow_remote_code: bool = False
    closed: Sequence[Path] = ()
    own: Sequence[Path] = ()
    pickles: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    passed: Sequence[str] = ()
    home: Path | None = None


class Child:
    """A running child. ``with`` ends it, and all that it started, on the way out."""

    def __init__(self, task: Task, log: IO[str] | None = None) -> None:
        self.task = task
        self._log, self._lines = log, deque[str](maxlen=LOG_LINES)
        self._scratch = tempfile.TemporaryDirectory(prefix="quantize-child-", ignore_cleanup_errors=True)
        self._answer = bytearray()
        self._lock, self._ended, self._late = threading.Lock(), False, False
        home = Path(self._scratch.name)
        reader, writer = os.pipe()
        try:
            self.process = subprocess.Popen(
                [str(task.python or sys.executable), "-I", "-B", "-u", "-X", "utf8", str(MAIN)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd=home,
                env=environment(home, task.home, task.variables, task.passed), pass_fds=(writer,),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            self._scratch.cleanup()
            raise
        finally:
            os.close(writer)
        self._threads = [
            threading.Thread(target=self._read_answer, args=(reader,), daemon=True),
            threading.Thread(target=self._see_to_its_end, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(json.dumps(self._request(writer, home)).encode("ascii"))

    def _request(self, writer: int, home: Path) -> dict[str, Any]:
        task = self.task
        return {
            "worker": os.path.abspath(task.worker), "arguments": task.arguments, "answer": writer,
            "path": [os.path.abspath(folder) for folder in task.path],
            "imports": None if task.python else _imports(), "limits": {"RLIMIT_CORE": 0, **task.limits},
            "parent": os.getpid(), "allow_remote_code": task.allow_remote_code, "pickles": task.pickles,
            "closed": [os.path.abspath(folder) for folder in task.closed],
            "own": [os.path.abspath(folder) for folder in task.own],
            "generated": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(home / "generated"),
        }  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for thread in self._threads:
            thread.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._scratch.cleanup()

    def kill(self) -> None:
        """End it and all that it started."""
        with self._lock:
            if not self._ended:
                _kill_session(self.process.pid)

    def wait(self, on_line: Callable[[str], None] | None = None) -> Any:
        """Wait for its answer.

        Args:
            on_line: hears every line that it prints, as it comes.

        Raises:
            ChildFailed: it failed, died or took too long.
        """
        for line in _lines(self.process.stdout):
            self._lines.append(line)
            if self._log is not None:
                self._log.write(line)
            if on_line:
                on_line(line)
        for thread in self._threads:
            thread.join()
        return self._judge(self.process.returncode)

    @property
    def log(self) -> str:
        """The last lines that it printed."""
        return "".join(self._lines)

    def _see_to_its_end(self) -> None:
        """Wait for it, and end it when its time is over.

        What it started and left behind ends with it, and before its process number can be another's: its pipes would
        stay open, and those who read them wait.
        """
        until = time.monotonic() + self.task.seconds if self.task.seconds else None
        pause = 0.001
        while not _has_ended(self.process, block=until is None):
            if until is not None and time.monotonic() > until and not self._late:
                self._late = True
                self.kill()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        with self._lock:
            _kill_session(self.process.pid)
            self.process.wait()
            self._ended = True

    def _read_answer(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as pipe:
            while chunk := pipe.read(2**16):
                self._answer += chunk
                if len(self._answer) > MOST_ANSWER:
                    self.kill()
                    return

    def _judge(self, code: int) -> Any:
        if self._late:
            raise ChildFailed(f"gave no answer in {self.task.seconds:g} seconds", "", code, self.log)
        try:
            said = json.loads(bytes(self._answer))
        except ValueError:
            raise ChildFailed(_death(code, self.log), "", code, self.log) from None
        if "error" in said:
            reason = str(said["error"])[:REASON] or str(said.get("kind"))
            raise ChildFailed(reason, str(said.get("kind")), code, self.log, said.get("refused", ()))
        return said["value"]


def _has_ended(process: subprocess.Popen[bytes], block: bool) -> bool:
    """Whether it has; its number stays taken where the system can tell without burying it."""
    if not hasattr(os, "waitid"):  # macOS
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if block else 0)
        return process.returncode is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | (0 if block else os.WNOHANG)) is not None
    except ChildProcessError:  # in a program that buries all its children itself
        return True


def _kill_session(number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS refuses where only the dead one is left
        os.killpg(number, signal.SIGKILL)


def _lines(stream: IO[bytes] | None) -> Iterator[str]:
    """Lines of a stream, each with its end, of bounded length."""
    assert stream is not None
    rest = b""
    while chunk := stream.read(2**16):
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            yield line[:LONGEST_LINE].decode("utf-8", errors="replace") + "\n"
        if len(rest) > LONGEST_LINE:
            yield rest[:LONGEST_LINE].decode("utf-8", errors="replace") + "\n"
            rest = b""
    if rest:
        yield rest.decode("utf-8", errors="replace") + "\n"


def _imports() -> list[str]:
    """Where this process imports from, save the current folder, which may be a stranger's checkout."""
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:
        here = ""
    return [os.path.abspath(path) for path in sys.path if path and os.path.realpath(path) != here]


def run_child(task: Task, on_line: Callable[[str], None] | None = None, log: IO[str] | None = None) -> Any:
    """Run a child to its end; its answer.

    Args:
        on_line: hears every line that it prints. log: takes them too.

    Raises:
        ChildFailed: it failed, died or took too long.
    """
    with Child(task, log) as child:
        return child.wait(on_line)


def environment(
    scratch: Path, home: Path | None = None, variables: Mapping[str, str] | None = None, passed: Sequence[str] = ()
) -> dict[str, str]:
    """A child's environment: what computing needs, no tokens, no hub, nothing of the user's own.

    Args:
        scratch: an empty folder of the child's own. home: what stands for the user's home; None is ``scratch``.
        passed: patterns of the user's variables that are passed on too, secrets excepted.
    """
    none = str(scratch / "none")
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "generated"),
        **computing_environment(passed=passed),
        "HOME": str(home or scratch), "HF_HOME": str(scratch / "hub"), "HF_TOKEN_PATH": none, "NETRC": none,
        "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
        **(variables or {}),
    }  # fmt: skip


def computing_environment(network: bool = False, passed: Sequence[str] = ()) -> dict[str, str]:
    """The user's variables that say how to compute, and with ``network`` how to reach a package index."""
    prefixes = PASSED_PREFIXES + (NETWORK if network else ())
    found = {}
    for name, value in os.environ.items():
        known = name in PASSED or name.upper().startswith(prefixes)
        if (
            (known or any(fnmatch.fnmatchcase(name, pattern) for pattern in passed))
            and not is_secret(name)
            and (network or not LOGIN.search(value))
        ):
            found[name] = value
    return found


def is_secret(name: str) -> bool:
    """Whether a variable's name says that it holds a secret."""
    upper = name.upper()
    return bool(SECRET.search(upper)) and not upper.startswith("TOKENIZERS_") and upper not in NO_SECRETS


@contextmanager
def without_secrets() -> Iterator[None]:
    """Take tokens out of this process's environment while code of a model's repo is in use.

    Its code then finds no token in the environment, and the hub's client none in its files. It is no sandbox: the code
    can still read the user's files, this program's memory, and what the system shows of the environment that this
    process was started with.
    """
    from huggingface_hub import constants  # first: it reads the variables once, when it is imported

    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_secret(name)}
    before = {name: os.environ.get(name) for name in ("HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN")}
    os.environ |= {"HF_TOKEN_PATH": os.devnull, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    nothing = {
        "HF_TOKEN_PATH": os.devnull,
        "HF_STORED_TOKENS_PATH": os.devnull,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    }
    known = {name: getattr(constants, name) for name in nothing if hasattr(constants, name)}
    for name in known:
        setattr(constants, name, nothing[name])
    try:
        yield
    finally:
        for name, found in known.items():
            setattr(constants, name, found)
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
