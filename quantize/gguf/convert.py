"""Convert a checkpoint to one full-width GGUF file, with llama.cpp's converter in a child process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantize.errors import GgufError, GgufRunError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder
from quantize.files.child import ChildFailed, Task, run_child
from quantize.files.space import touch
from quantize.formats.gguf_reader import open_gguf
from quantize.formats.safetensors_header import write_hollow
from quantize.formats.tensors import TensorSpec
from quantize.gguf.reasons import QUIET, reason_of
from quantize.gguf.toolchain import require_library, tree, tree_identity
from quantize.reporter import SILENT, Reporter
from quantize.source.checkpoint import Checkpoint
from quantize.source.resolved import Source
from quantize.source.unchanged import check_small_files, check_weights

TABLE = "tensors-2.json"
"""What is known of a header, beside it; the number is raised when that changes."""
SLACK = 64 * 2**20  # bytes allowed for the header
HEADER_SECONDS = 3600.0
"""Time limit of a header run, in seconds: it reads no weights, but a bad tokenizer may never finish."""


@dataclass(frozen=True)
class Header:
    """The header of a full-width GGUF.

    Attributes:
        path: a file with the header, followed by a hole (or the data).
        converted: for each tensor of the checkpoint, the GGUF tensors it was converted to.
        made_of: the reverse, each in the order in which they were put together, such as that of stacked experts.
        nbytes: size of a level's header before its own metadata, without padding. keys: names of its metadata.
        architecture: its name in the checkpoint's config.
        notes: what the converter was told to do differently for this checkpoint, one sentence each.
    """

    path: Path
    converted: Mapping[str, list[str]]
    made_of: Mapping[str, list[str]]
    nbytes: int
    keys: frozenset[str]
    architecture: str
    notes: tuple[str, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the GGUF tensors, in the row-major order of torch."""
        return {
            tensor.name: tuple(int(length) for length in reversed(tensor.shape))
            for tensor in open_gguf(self.path).tensors
        }


@dataclass(frozen=True)
class Conversion:
    """The full-width GGUF file of a source, converted on demand.

    Attributes:
        outtype: F16, BF16 or F32. name: ``general.name``.
        authorship: other ``general.`` keys of the file, such as ``general.quantized_by``.
        trust_remote_code: let the converter run code from the model's repo.
        part: ``text``, the language model, or ``mmproj``, the encoder and projector of its images or sound.
        nextn: whether layers that predict further tokens go into the file, where the checkpoint has some.
    """

    source: Source
    outtype: str
    name: str
    authorship: Mapping[str, Any]
    trust_remote_code: bool = False
    part: Literal["text", "mmproj"] = "text"
    nextn: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What the file depends on."""
        return {
            "source": dict(self.source.hashes),
            "outtype": self.outtype,
            "converter": tree_identity(),
            "name": self.name,
            "authorship": dict(self.authorship),
            # a tokenizer with code in the repo may have another vocabulary than the library's
            **({"trust_remote_code": True} if self.trust_remote_code else {}),
            **({"part": self.part} if self.part != "text" else {}),
            **({} if self.nextn else {"nextn": False}),
        }

    @property
    def folder(self) -> Path:
        """Its folder in the cache."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return cache_folder() / "gguf" / digest[:32]

    @property
    def path(self) -> Path:
        return self.folder / f"{self.outtype}.gguf"

    def header(self, reporter: Reporter = SILENT) -> Header:
        """The header, from the cache or from a run of the converter that reads no weights.

        Raises:
            GgufError: llama.cpp is missing, or cannot convert this model; the message gives its reason.
        """
        path, table = self.folder / "header.gguf", self.folder / TABLE
        if not (path.is_file() and table.is_file()):
            reporter.say(f"asking llama.cpp for the tensors of {self.source.named}")
            found = self._run(path, "header", reporter)
            if self.part == "text":
                self._check_loads(path)
            write_atomically(table, json.dumps(found).encode())
        touch(self.folder)
        data = json.loads(table.read_text(encoding="utf-8"))
        return Header(
            path, data["became"], data["made_of"], data["header_bytes"], frozenset(data["keys"]), data["architecture"],
            tuple(data["notes"]),
        )  # fmt: skip

    def _check_loads(self, header: Path) -> None:
        """Have llama.cpp load the header, so that what it cannot load is known before any work."""
        worker = Path(__file__).with_name("worker_logits.py")
        try:
            run_child(Task(worker, {"model": str(header.resolve())}, variables=QUIET, seconds=HEADER_SECONDS))
        except ChildFailed as error:
            raise GgufError(
                f"{self.source.named}: llama.cpp converts this model, but cannot load the result: {reason_of(error)}"
            ) from None

    def make(self, reporter: Reporter = SILENT) -> Path:
        """The file, from the cache or converted now.

        Raises:
            GgufError: see :meth:`header`; or there is not enough disk space.
        """
        if not self.path.is_file():
            header = self.header(reporter)
            needed, free = header.path.stat().st_size + SLACK, shutil.disk_usage(self.folder).free
            if needed > free:
                raise GgufRunError(
                    f"{self.folder}: the intermediate {self.outtype} file takes {needed / 1e9:.2f} GB, but only "
                    f"{free / 1e9:.2f} GB are free; free some space or set QUANTIZE_CACHE to another disk"
                )
            reporter.say(f"converting {self.source.named} to one {self.outtype} GGUF (only once; it is cached)")
            self._run(self.path, "full", reporter)
        return self.path

    def _run(self, path: Path, mode: str, reporter: Reporter) -> dict[str, Any]:
        require_library()
        code = tree(reporter)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        authorship = path.with_name(f".{path.name}.{os.getpid()}.json")
        authorship.write_text(json.dumps(dict(self.authorship)), encoding="utf-8")
        with ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            stack.callback(authorship.unlink, missing_ok=True)
            model = stack.enter_context(_outline(self.source)) if mode == "header" else self.source.folder
            arguments = {
                "model": str(model.resolve()), "out": str(temporary.resolve()), "outtype": self.outtype, "mode": mode,
                "name": self.name, "metadata": str(authorship.resolve()), "part": self.part, "nextn": self.nextn,
            }  # fmt: skip
            worker = Path(__file__).with_name("worker_convert.py")
            imports = (code.resolve(), code.resolve() / "gguf-py")
            folders = (model, model.resolve(), self.source.checkpoint.folder, self.source.small_files)
            task = Task(
                worker, arguments, path=imports, allow_remote_code=self.trust_remote_code,
                closed=[folder for folder in folders if folder],
                seconds=HEADER_SECONDS if mode == "header" else None,
            )  # fmt: skip
            try:
                found: dict[str, Any] = run_child(task)
            except ChildFailed as error:
                raise GgufError(f"{self.source.named}: llama.cpp cannot convert this model: {_reason(error)}") from None
            # the converter reads the source itself, so check afterwards that the files still match their hashes
            check_small_files(self.source)
            if mode == "full":
                check_weights(self.source)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        return found


@contextmanager
def _outline(source: Source) -> Iterator[Path]:
    """The source's folder; if only headers were fetched, a folder with the small files and sparse weights."""
    if source.checkpoint.folder is not None or source.small_files is None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shards: dict[str, dict[str, TensorSpec]] = {}
        for name, spec in source.checkpoint.in_headers.items():
            shards.setdefault(spec.file, {})[name] = spec
        for file in source.small_files.iterdir():
            if file.is_file() and file.name not in shards:
                (folder / file.name).symlink_to(file.resolve())
        for name, tensors in shards.items():
            write_hollow(folder / name, tensors)
        yield folder


def outtype_of(checkpoint: Checkpoint, requested: str) -> str:
    """The file's type. ``auto`` follows the source: F16 for float16, else BF16, which has the range of float32."""
    if requested != "auto":
        return requested
    sizes: dict[str, int] = {}
    for spec in checkpoint.in_files.values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return "F16" if max(sizes, key=lambda kind: sizes[kind]) == "F16" else "BF16"


KNOWN_REASONS = (
    (
        r"pre-tokenizer was not recognized",
        "llama.cpp does not recognise its tokenizer; use the tokenizer files of the model's authors, "
        "or point LLAMA_CPP_DIR to a newer llama.cpp",
    ),
    (r"Model (\S+) is not supported", "its converter does not know the architecture {0}"),
    (r"No space left", "no space left on the disk of the cache; set QUANTIZE_CACHE to another one"),
)


def _reason(error: ChildFailed) -> str:
    """The reason that the converter gave, in one sentence."""
    if error.wants_remote_code:
        return (
            f"it needs code from the model's repo, {error.refused[-1]}, which does not run unless the recipe says "
            "`model.trust_remote_code: true` (`rebuild`: --trust-remote-code); read that code first"
        )
    for pattern, sentence in KNOWN_REASONS:
        if match := re.search(pattern, error.reason) or re.search(pattern, error.log):
            return sentence.format(*match.groups())
    if error.kind in {"", "RuntimeError"}:
        return error.reason
    where = _failed_line(error.log)
    if error.kind == "KeyError":
        sought = error.reason.strip("\"'").removeprefix("could not find any of: ")
        return f"it looks for {sought}, which config.json and the tokenizer's files lack{where}"
    if error.kind == error.reason or not error.reason:  # such as an assertion without a text
        return f"its own check failed{where}" if error.kind == "AssertionError" else f"{error.kind}{where}"
    return f"{error.kind}: {error.reason}"


def _failed_line(log: str) -> str:
    """The last line of code in a traceback, in brackets, or an empty string."""
    found = re.findall(r'^  File "[^"]*?([^"/]+)", line (\d+), in .*\n    (.+)$', log, re.MULTILINE)
    return f" ({found[-1][0]}, line {found[-1][1]}: {found[-1][2][:160].strip()})" if found else ""
