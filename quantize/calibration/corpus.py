"""Calibration texts: reading and identifying them. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quantize.errors import CalibrationError, TextUnreachableError, is_memory_shortage
from quantize.files.digest import cached_sha256, identity_of, sha256_of_file
from quantize.hub.errors import is_network
from quantize.recipe.presets import PRESETS
from quantize.recipe.schema import Corpus

SEPARATOR = "\n\n"
DOCUMENTED = (
    "argparse", "ast", "asyncio/base_events", "asyncio/events", "asyncio/streams", "collections/__init__",
    "concurrent/futures/_base", "configparser", "contextlib", "copy", "csv", "datetime", "difflib", "doctest",
    "email/message", "fractions", "functools", "gettext", "heapq", "http/client", "http/cookiejar", "imaplib",
    "importlib/abc", "inspect", "ipaddress", "locale", "logging/__init__", "mailbox", "multiprocessing/pool", "ntpath",
    "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "posixpath", "random", "selectors", "shutil",
    "smtplib", "socket", "socketserver", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "tokenize", "trace", "typing", "unittest/case", "unittest/loader", "unittest/mock",
    "urllib/request", "uuid", "weakref", "zipfile",
)  # fmt: skip
SHORTEST_DOCSTRING = 200  # characters; shorter ones are signatures rather than text
PIECE = 100_000  # characters read and tokenized at a time


def title(corpus: Corpus) -> str:
    """The corpus's name in tables."""
    return corpus.preset or corpus.hub or Path(str(corpus.file)).name


def url(corpus: Corpus) -> str | None:
    """The corpus's web address for the model card, if it has one."""
    if corpus.preset:
        return PRESETS[corpus.preset].url
    return f"https://huggingface.co/datasets/{corpus.hub}" if corpus.hub else None


def identity(corpus: Corpus) -> dict[str, Any]:
    """What determines the text, for keys: content hashes of local texts, names of remote ones.

    Raises:
        CalibrationError: a file does not exist or cannot be read.
    """
    if corpus.file is not None:
        try:
            path = _file(corpus.file)
            known = cached_sha256(path)
            _identified[path] = identity_of(path.resolve()), known
            return {"file_sha256": known, "column": corpus.column}
        except OSError as error:
            raise CalibrationError(f"{corpus.file}: cannot be read: {error.strerror}") from None
    if corpus.preset in CARRIED:
        return {"preset": corpus.preset, "sha256": hashlib.sha256(carried(corpus.preset).encode()).hexdigest()}
    parts = dict(zip(("name", "config", "split", "column", "revision"), _hub_parts(corpus), strict=True))
    return {"hub": parts | ({"data_files": list(corpus.data_files)} if corpus.data_files else {})}


_identified: dict[Path, tuple[str, str]] = {}
"""File identity and SHA-256 of each local text, as they went into keys."""


def check_unchanged(corpus: Corpus) -> None:
    """Check, after reading a local text, that it is still the one that :func:`identity` put into the keys.

    Raises:
        CalibrationError: the text has changed.
    """
    path = None if corpus.file is None else Path(os.path.expanduser(corpus.file))
    if path is None or path not in _identified:
        return
    identity, known = _identified[path]
    if not path.is_file() or (identity_of(path.resolve()) != identity and sha256_of_file(path) != known):
        raise CalibrationError(f"{path}: the text changed after it was hashed; build again")


def read_pieces(corpus: Corpus) -> Iterator[str]:
    """Read the text lazily in pieces of about ``PIECE`` characters, split after lines or records where possible.

    Raises:
        CalibrationError: the text is not found, not reachable, not readable, or lacks the column.
    """
    if corpus.file is not None:
        path = _file(corpus.file)
        return _read_records(path, corpus.column) if path.suffix == ".jsonl" else _read_plain(path)
    if corpus.preset in CARRIED:
        return _cut(io.StringIO(carried(corpus.preset), newline=""))
    return _joined(_read_hub(corpus))


def _cut(file: IO[str]) -> Iterator[str]:
    while piece := file.read(PIECE):
        yield piece + file.readline(PIECE)


def _joined(records: Iterable[str]) -> Iterator[str]:
    """Join records into pieces, separated by blank lines."""
    waiting: list[str] = []
    length = 0
    for record in records:
        waiting.append(record)
        length += len(record) + len(SEPARATOR)
        if length >= PIECE:
            yield SEPARATOR.join([*waiting, ""])
            waiting, length = [], 0
    if waiting:
        yield SEPARATOR.join(waiting)


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return SEPARATOR.join(topics[key] for key in sorted(topics))


def _docstrings() -> str:
    """The docstrings of standard library modules, their classes and functions, in file order."""
    import ast
    import inspect
    from sysconfig import get_path

    library, texts = Path(get_path("stdlib")), []
    for name in DOCUMENTED:
        # later versions turned some modules into packages and removed others
        file = next((path for path in (library / f"{name}.py", library / name / "__init__.py") if path.is_file()), None)
        if file is None:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False) or ""
                if len(text) >= SHORTEST_DOCSTRING:
                    texts.append(inspect.cleandoc(text))
    return SEPARATOR.join(texts)


CARRIED = {"pydoc": _pydoc, "docstrings": _docstrings}
"""Texts shipped with CPython."""


@functools.cache
def carried(preset: str) -> str:
    """Such a text, made once a process: parsing the library takes a second, and keys and windows both need it."""
    return CARRIED[preset]()


def _file(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise CalibrationError(f"{name}: the calibration file does not exist")
    return path


def _read_plain(path: Path) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8", newline="") as file:
        yield from _cut(file)


def _read_records(path: Path, column: str | None) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8", newline="") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        yield from _joined(_record(line, column or "text", f"{path}:{number}") for number, line in lines)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise CalibrationError(f"{path}: is not UTF-8 text (byte {_first_bad_byte(path)})") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from None


def _first_bad_byte(path: Path) -> int:
    """Offset of the first byte that is not UTF-8; a buffered reader's error gives it within its buffer only."""
    position, rest = 0, b""
    with path.open("rb") as file:
        while chunk := file.read(PIECE):
            data = rest + chunk
            try:
                data.decode()
                rest = b""
            except UnicodeDecodeError as error:
                if len(data) - error.start > 4:  # too many bytes for a character split between chunks
                    return position + error.start
                rest = data[error.start :]
            position += len(data) - len(rest)
    return position


def _record(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is not JSON: {error}") from None
    value = record.get(column) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: has no text in the column '{column}'; set `column:` to the right one")
    try:
        value.encode()  # JSON can contain lone surrogates, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: contains half of a character (a lone surrogate): {error.reason}") from None
    return value


def _hub_parts(corpus: Corpus) -> tuple[str, str | None, str, str, str | None]:
    if corpus.preset:
        preset = PRESETS[corpus.preset]
        return str(preset.hub), preset.config, preset.split, preset.column, None
    return str(corpus.hub), corpus.config, corpus.split or "train", corpus.column or "text", corpus.revision


def _read_hub(corpus: Corpus) -> Iterator[str]:
    """Stream the records of a hub dataset; only what is consumed is downloaded."""
    from datasets import load_dataset

    name, config, split, column, revision = _hub_parts(corpus)
    files = list(corpus.data_files) or None
    try:
        dataset = load_dataset(name, config, split=split, revision=revision, data_files=files, streaming=True)
        for number, record in enumerate(dataset):
            if number == 0 and column not in record:
                raise CalibrationError(
                    f"calibration.dataset: {name} has no column '{column}'; it has {', '.join(map(str, record))[:300]}"
                )
            yield str(record[column])
    except (CalibrationError, GeneratorExit):
        raise
    except Exception as error:  # the library passes on any error of its readers
        if is_memory_shortage(error):
            raise
        reason = " ".join(str(error).split())[:300]
        unreachable = isinstance(error, ConnectionError) or is_network(error)
        raise (TextUnreachableError if unreachable else CalibrationError)(
            f"calibration.dataset: {name} could not be loaded ({type(error).__name__}: {reason}); without a hub "
            "use `pydoc` or a text file"
        ) from None
