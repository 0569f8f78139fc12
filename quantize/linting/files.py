"""One interface to a repo's files in a folder or on the hub, where only the needed byte ranges are read."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.errors import SourceError
from quantize.files.inside import sound_files, stray
from quantize.formats.safetensors_header import Header, read_header
from quantize.formats.tensors import DTYPE_BYTES
from quantize.hub.client import Hub
from quantize.recipe.schema import REPO_NAME

MOST_TEXT = 64_000_000
"""Largest JSON or Markdown file that is read, in bytes; tokenizers of large vocabularies take 20 to 40 MB."""
MOST_TENSOR = 1_000_000_000
"""Largest tensor whose values are checked, in bytes; scales and g_idx of the largest models take a tenth."""


class RepoFiles(ABC):
    """The files of one branch.

    Attributes:
        name: of the repo. branch: None if unknown, as for some folders.
        sizes: bytes by name.
        strays: entries that are not read and not in ``sizes`` (links to other folders, pipes): the reason by name.
        is_local: whether reading much is cheap.
    """

    name: str
    branch: str | None
    sizes: dict[str, int]
    strays: Mapping[str, str] = MappingProxyType({})
    is_local: bool

    @abstractmethod
    def read(self, name: str, first: int, last: int) -> bytes:
        """Bytes of a file from a first (inclusive) to a last (exclusive) position; fewer at its end."""

    def text(self, name: str) -> str | None:
        """A small file's text; None if the file is missing or not text."""
        if name not in self.sizes or self.sizes[name] > MOST_TEXT:
            return None
        try:
            return self.read(name, 0, self.sizes[name]).decode("utf-8")
        except UnicodeDecodeError:
            return None

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None if the file is missing or contains something else."""
        text = self.text(name)
        try:
            data = json.loads(text) if text is not None else None
        except (ValueError, RecursionError):
            return None
        return data if isinstance(data, dict) else None

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json") or {}

    @cached_property
    def headers(self) -> dict[str, Header | str]:
        """Headers of the safetensors files by name; for an unreadable one, the reason."""
        found: dict[str, Header | str] = {}
        for name in sorted(self.sizes):
            if name.endswith(".safetensors"):
                try:
                    found[name] = read_header(partial(self.read, name), name)
                except ValueError as error:
                    found[name] = str(error)
        return found

    def tensor(self, name: str) -> Any:
        """A tensor as a numpy array; None if that is impossible (BF16, truncated, or too large)."""
        import numpy as np

        kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "<u1", "I8": "<i1"}
        for file, header in self.headers.items():
            if isinstance(header, Header) and name in header.tensors:
                spec, (first, last) = header.tensors[name], header.places[name]
                kind = kinds.get(spec.dtype)
                if last - first > MOST_TENSOR:
                    return None
                if kind is None or last - first != spec.nbytes or DTYPE_BYTES[spec.dtype] != np.dtype(kind).itemsize:
                    return None
                data = self.read(file, first, last)
                return np.frombuffer(data, kind).reshape(spec.shape) if len(data) == last - first else None
        return None


class LocalFiles(RepoFiles):
    """A branch in a folder."""

    is_local = True

    def __init__(self, folder: Path, branch: str | None = None) -> None:
        self.folder = folder
        self.name = folder.name if branch is None else folder.parent.name
        self.branch = branch
        found, self.strays = sound_files(folder, lambda name: ".git" not in name.split("/"))
        self.sizes = {name: path.stat().st_size for name, path in found.items()}

    def read(self, name: str, first: int, last: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            file.seek(first)
            return file.read(last - first)


class HubFiles(RepoFiles):
    """A branch on the hub, at the commit of its listing."""

    is_local = False

    def __init__(self, hub: Hub, repo: str, branch: str, head: str) -> None:
        from huggingface_hub import HfFileSystem

        self.name, self.branch, self.hub, self.head = repo, branch, hub, head
        listed = hub.files(repo, head)
        self.sizes = {name: file.nbytes for name, file in listed.items()}
        self.sha256 = {name: file.sha256 for name, file in listed.items() if file.sha256 is not None}
        self.system = HfFileSystem(endpoint=hub.api.endpoint, token=hub.api.token)

    def read(self, name: str, first: int, last: int) -> bytes:
        last = min(last, self.sizes[name])
        if last <= first:
            return b""
        where = f"{self.name}@{self.head}/{name}"
        # no cache: it would read megabytes ahead
        with self.hub.explained(self.name), self.system.open(where, "rb", cache_type="none") as file:
            file.seek(first)
            return bytes(file.read(last - first))


def open_target(target: str, endpoint: str | None, *, local: bool = True) -> list[RepoFiles]:
    """Open the branches of a folder or a hub repo.

    Args:
        target: a branch's folder, a folder of branches as in dist, ``owner/name``, or ``owner/name@branch``.
        local: whether it may be a folder; for names from cards it may not.

    Raises:
        SourceError: the folder, repo or branch does not exist. PushError: the hub refuses, or cannot be reached.
    """
    path = Path(os.path.expanduser(target))
    if local and os.path.isdir(path):
        return _local(path.resolve())
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", target)
    if not match or not all(map(REPO_NAME.fullmatch, match[1].split("/"))):
        raise SourceError(f"{target}: no such directory, nor a hub id; give a folder, owner/name or owner/name@branch")
    hub, (repo, branch) = Hub(endpoint), match.groups()
    heads = hub.heads(repo)
    if not heads:
        raise SourceError(f"{repo}: no such directory and no such repo on the hub; check the name, or log in")
    if branch and branch not in heads:
        raise SourceError(f"{repo}: has no branch {branch}; its branches are {', '.join(sorted(heads))}")
    chosen = [branch] if branch else sorted(heads, key=lambda name: (name != "main", name))
    return [HubFiles(hub, repo, name, heads[name]) for name in chosen]


def _local(path: Path) -> list[RepoFiles]:
    marks = ("config.json", "README.md", "*.gguf", "*.safetensors")
    if any(any(path.glob(mark)) for mark in marks):
        return [LocalFiles(path)]
    branches = [
        folder for folder in sorted(path.iterdir())
        if folder.is_dir() and not folder.name.startswith(".") and stray(folder, path) is None
    ]  # fmt: skip
    found = [LocalFiles(folder, folder.name) for folder in branches if any(any(folder.glob(mark)) for mark in marks)]
    if not found:
        raise SourceError(f"{path}: contains neither a model nor branches of one (no config.json, no .gguf file)")
    return [*found]
