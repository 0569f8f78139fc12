"""From a checkpoint to one full-width GGUF, by llama.cpp's own converter in a child process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import GgufError, GgufRunError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder
from quantize.files.notify import Notify
from quantize.files.space import touch
from quantize.formats.safetensors_header import write_hollow
from quantize.formats.tensors import TensorSpec
from quantize.gguf.toolchain import require_library, tree, tree_identity
from quantize.source.checkpoint import Checkpoint
from quantize.source.resolved import Source

SLACK = 64 * 2**20  # what a header may take


@dataclass(frozen=True)
class Header:
    """The header of a full-width GGUF.

    Attributes:
        path: a file that has the header, and a hole (or the data) after it.
        became: for each tensor of the checkpoint, the GGUF tensors it went into.
        nbytes: of the header without padding. keys: of its metadata.
        architecture: as the checkpoint's config names it.
    """

    path: Path
    became: Mapping[str, list[str]]
    nbytes: int
    keys: frozenset[str]
    architecture: str


@dataclass(frozen=True)
class Conversion:
    """One full-width GGUF of a source, made or to be made.

    Attributes:
        outtype: F16, BF16 or F32. name: ``general.name``.
        authorship: further ``general.`` keys of the file, such as ``general.quantized_by``.
    """

    source: Source
    outtype: str
    name: str
    authorship: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the file depends on."""
        return {
            "source": dict(self.source.hashes),
            "outtype": self.outtype,
            "converter": tree_identity(),
            "name": self.name,
            "authorship": dict(self.authorship),
        }

    @property
    def folder(self) -> Path:
        """Where the cache keeps it."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return cache_folder() / "gguf" / digest[:32]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.outtype}.gguf"

    def header(self, notify: Notify = lambda line: None) -> Header:
        """The header, from the cache or from a run of the converter that reads no weights.

        Raises:
            GgufError: llama.cpp is missing, or cannot convert this model; its reason is the message.
        """
        path, table = self.folder / "header.gguf", self.folder / "header.json"
        if not (path.is_file() and table.is_file()):
            notify(f"asking llama.cpp for the tensors of {self.source.named}")
            found = self._run(path, "header", notify)
            write_atomically(table, json.dumps(found).encode())
        touch(self.folder)
        data = json.loads(table.read_text(encoding="utf-8"))
        return Header(path, data["became"], data["header_bytes"], frozenset(data["keys"]), data["architecture"])

    def make(self, notify: Notify = lambda line: None) -> Path:
        """The file itself, from the cache or converted now.

        Raises:
            GgufError: as :meth:`header`, or not enough disk.
        """
        if not self.path.is_file():
            header = self.header(notify)
            needed, free = header.path.stat().st_size + SLACK, shutil.disk_usage(self.folder).free
            if needed > free:
                raise GgufRunError(
                    f"{self.folder}: the intermediate {self.outtype} file takes {needed / 1e9:.2f} GB, but only "
                    f"{free / 1e9:.2f} GB are free; free some space or set QUANTIZE_CACHE to another disk"
                )
            notify(f"converting {self.source.named} to one {self.outtype} GGUF (once; kept in the cache)")
            self._run(self.path, "full", notify)
        return self.path

    def _run(self, path: Path, mode: str, notify: Notify) -> dict[str, Any]:
        require_library()
        code = tree(notify)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        authorship = path.with_name(f".{path.name}.{os.getpid()}.json")
        authorship.write_text(json.dumps(dict(self.authorship)), encoding="utf-8")
        worker = Path(__file__).with_name("worker_convert.py")
        stack = ExitStack()
        model = stack.enter_context(_outline(self.source)) if mode == "header" else self.source.folder
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(code), str(code / "gguf-py")]),
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(worker), str(model), str(temporary), self.outtype, mode]
        try:
            done = subprocess.run(
                [*command, self.name, str(authorship)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise GgufError(f"{self.source.named}: llama.cpp cannot convert this model: {_reason(done.stderr)}")
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            stack.close()
            temporary.unlink(missing_ok=True)
            authorship.unlink(missing_ok=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


@contextmanager
def _outline(source: Source) -> Iterator[Path]:
    """The source's folder; where only headers were fetched, one with the small files and hollow weights."""
    if source.checkpoint.folder is not None or source.small_files is None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in source.checkpoint.tensors.items():
            shards.setdefault(spec.file, {})[name] = spec
        for file in source.small_files.iterdir():
            if file.is_file() and file.name not in shards:
                (folder / file.name).symlink_to(file.resolve())
        for name, tensors in shards.items():
            write_hollow(folder / name, tensors)
        yield folder


def outtype_of(checkpoint: Checkpoint, wish: str) -> str:
    """``auto`` is the width of the source: F16 for float16, else BF16, which keeps the range of float32."""
    if wish != "auto":
        return wish
    sizes: dict[str, int] = {}
    for spec in checkpoint.tensors.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return "F16" if max(sizes, key=lambda kind: sizes[kind]) == "F16" else "BF16"


KNOWN_REASONS = (
    (
        r"pre-tokenizer was not recognized",
        "its tokenizer is not one that llama.cpp recognises; take the tokenizer files of the model's authors, "
        "or point LLAMA_CPP_DIR to a newer llama.cpp",
    ),
    (r"Model (\S+) is not supported", "its converter does not know the architecture {0}"),
    (r"No space left", "no space left on the disk of the cache; set QUANTIZE_CACHE to another one"),
)


def _reason(log: str) -> str:
    """The converter's own reason, in one sentence."""
    for pattern, sentence in KNOWN_REASONS:
        if match := re.search(pattern, log):
            return sentence.format(*match.groups())
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith((" ", "INFO"))]
    return lines[-1][:300] if lines else "it gave no reason"
