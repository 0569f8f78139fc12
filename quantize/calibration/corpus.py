"""Calibration texts: where they come from, and what identifies them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from quantize.errors import CalibrationError, TextUnreachableError, is_memory_shortage
from quantize.files.digest import cached_sha256
from quantize.hub.client import is_network
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
CHARACTERS_PER_TOKEN = 24  # generous: reading stops once a corpus surely holds enough tokens


def title(corpus: Corpus) -> str:
    """What tables call it."""
    return corpus.preset or corpus.hub or Path(str(corpus.file)).name


def url(corpus: Corpus) -> str | None:
    """A link for the card."""
    if corpus.preset:
        return PRESETS[corpus.preset].url
    return f"https://huggingface.co/datasets/{corpus.hub}" if corpus.hub else None


def identity(corpus: Corpus) -> dict[str, Any]:
    """What determines the text, for keys: content hashes where the text is local, names where it is remote.

    Raises:
        CalibrationError: a file that does not exist, or cannot be read.
    """
    if corpus.file is not None:
        try:
            return {"file_sha256": cached_sha256(_file(corpus.file)), "column": corpus.column}
        except OSError as error:
            raise CalibrationError(f"{corpus.file}: cannot be read: {error.strerror}") from None
    if corpus.preset in CARRIED:
        return {"preset": corpus.preset, "sha256": hashlib.sha256(CARRIED[corpus.preset]().encode()).hexdigest()}
    return {"hub": dict(zip(("name", "config", "split", "column", "revision"), _hub_parts(corpus), strict=True))}


def read_text(corpus: Corpus, tokens: int) -> str:
    """The text, as long as ``tokens`` random tokens can be cut from it.

    Raises:
        CalibrationError: not found, not reachable, empty, or without the column.
    """
    if corpus.file is not None:
        return _read_file(_file(corpus.file), corpus.column)
    if corpus.preset in CARRIED:
        return CARRIED[corpus.preset]()
    return _read_hub(corpus, tokens * CHARACTERS_PER_TOKEN)


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return SEPARATOR.join(topics[key] for key in sorted(topics))


def _docstrings() -> str:
    """What the library's modules say of themselves and of their classes and functions, in the order of their files."""
    import ast
    import inspect
    from sysconfig import get_path

    library, texts = Path(get_path("stdlib")), []
    for name in DOCUMENTED:
        # some became packages in later versions, some left
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
"""Texts that CPython itself carries."""


def _file(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise CalibrationError(f"{name}: no such calibration file")
    return path


def _read_file(path: Path, column: str | None) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix != ".jsonl":
                return file.read()
            texts = []
            for number, line in enumerate(file, 1):
                if line.strip():
                    texts.append(_record(line, column or "text", f"{path}:{number}"))
            return SEPARATOR.join(texts)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from None


def _record(line: str, column: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: is not JSON: {error}") from None
    value = record.get(column) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: has no text in the column '{column}'; set `column:` to the right one")
    try:
        value.encode()  # JSON can spell half of a character, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: holds half of a character (a lone surrogate): {error.reason}") from None
    return value


def _hub_parts(corpus: Corpus) -> tuple[str, str | None, str, str, str | None]:
    if corpus.preset:
        preset = PRESETS[corpus.preset]
        return str(preset.hub), preset.config, preset.split, preset.column, None
    return str(corpus.hub), corpus.config, corpus.split or "train", corpus.column or "text", corpus.revision


def _read_hub(corpus: Corpus, characters: int) -> str:
    from datasets import load_dataset

    name, config, split, column, revision = _hub_parts(corpus)
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library raises whatever its readers raise
        if is_memory_shortage(error):
            raise
        reason = " ".join(str(error).split())[:300]
        unreachable = isinstance(error, ConnectionError) or is_network(error)
        raise (TextUnreachableError if unreachable else CalibrationError)(
            f"calibration.dataset: {name} could not be loaded ({type(error).__name__}: {reason}); without a hub "
            "use `pydoc` or a text file"
        ) from None
    if column not in dataset.column_names:
        raise CalibrationError(
            f"calibration.dataset: {name} has no column '{column}'; it has {', '.join(dataset.column_names)}"
        )
    texts, length = [], 0
    for record in dataset:
        texts.append(str(record[column]))
        length += len(texts[-1]) + len(SEPARATOR)
        if length > characters:
            break
    return SEPARATOR.join(texts)
