"""``quantize-manifest.json``: what a branch was made of, how, and how each module came out.

Manifests are plain data; :mod:`quantize.dist.manifest_schema` says what must hold of it. They are written here and
nowhere else: a new branch's by :func:`create`, before the branch reaches its place, and one in its place by
:func:`update`, under the lock of its dist.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from quantize.dist.layout import WORK_FOLDER, Dist, FileEntry
from quantize.dist.ledger import LedgerEntry
from quantize.dist.manifest_schema import SCHEMA, problem
from quantize.errors import BuildError
from quantize.files.atomic import as_json, write_atomically
from quantize.files.inside import stray

MANIFEST_NAME = "quantize-manifest.json"
MOST_BYTES = 100_000_000
"""Of a manifest that is read; thirty thousand modules take 6 MB."""


class Recorded(TypedDict, total=False):
    """What a manifest says of one branch, of one GGUF level, or of the importance matrix; each has some of the keys."""

    key: str
    key_inputs: dict[str, Any]
    calibration: dict[str, Any]
    compute: dict[str, Any]
    versions: dict[str, str]
    engine: dict[str, Any]
    tensor_bytes: int
    entries: int
    shards: int
    files: dict[str, FileEntry]
    tensor_types: dict[str, str]
    fallbacks: list[str]
    solve: str
    tensors: list[dict[str, Any]]
    ledger: list[dict[str, Any]]
    left: list[dict[str, Any]]
    share_quantized: float
    quality: dict[str, Any]


class Manifest(Recorded, total=False):
    """The manifest of a branch, or of all levels of a GGUF repo."""

    schema: int
    repo: str
    branch: str
    source: dict[str, Any]
    conversion: dict[str, Any]
    imatrix: Recorded | None
    levels: dict[str, Recorded]
    loads_in: dict[str, str]


def manifest(
    *,
    branch: str,
    repo: str,
    key: str,
    key_inputs: dict[str, Any],
    source: dict[str, Any],
    calibration: dict[str, Any],
    compute: dict[str, Any],
    versions: dict[str, str],
    tensor_bytes: int,
    files: dict[str, FileEntry],
    ledger: list[LedgerEntry],
    rest: Recorded,
    engine: dict[str, Any] | None = None,
) -> Manifest:
    """The manifest as plain data. It holds no time, no path of the machine and no name of a user.

    Args:
        rest: ``left``, what stays in 16 bits and why, and ``share_quantized``, the part of the blocks' weights that
            does not.
        engine: name, version and packages of another engine; None for our own solvers.
    """
    return {
        "schema": SCHEMA,
        "repo": repo,
        "branch": branch,
        "key": key,
        "key_inputs": key_inputs,
        "source": source,
        "calibration": calibration,
        "compute": compute,
        "versions": versions,
        **({"engine": engine} if engine else {}),
        "tensor_bytes": tensor_bytes,
        "files": files,
        **rest,
        "ledger": [entry.as_data() for entry in ledger],
    }


def create(folder: Path, data: Manifest) -> None:
    """Write the manifest of a branch that is being made, in a folder of the work folder.

    Raises:
        BuildError: the manifest is not sound, or the folder is in place already.
    """
    if WORK_FOLDER not in folder.parts:
        raise BuildError(f"{folder}: is no unfinished branch; what is in place is changed under the lock of its dist")
    write_atomically(folder / MANIFEST_NAME, _sound(folder, data))


def update(held: Dist, folder: Path, change: Callable[[Manifest | None], Manifest]) -> Manifest:
    """Change the manifest of a folder of a dist, whose lock is held. The same bytes are not written again.

    Args:
        change: makes the new manifest of the one that lies there now; that is None where there is none that is sound.

    Returns:
        The new manifest.

    Raises:
        BuildError: the folder is not in this dist, or the new manifest is not sound.
    """
    if not folder.resolve().is_relative_to(held.folder.resolve()):
        raise BuildError(f"{folder}: does not lie in {held.folder}")
    path, data = folder / MANIFEST_NAME, change(read_manifest(folder))
    text = _sound(folder, data)
    if path.is_symlink() or not path.is_file() or path.read_bytes() != text:
        held.write(path, text)
    return data


def with_quality(data: Manifest, quality: Mapping[str, Any], level: str | None = None) -> Manifest:
    """A manifest with measured figures, of the branch, or of one of its GGUF levels."""
    if level is None:
        return {**data, "quality": dict(quality)}
    return {**data, "levels": {**data["levels"], level: {**data["levels"][level], "quality": dict(quality)}}}


def with_level(data: Manifest, level: str, entry: Recorded) -> Manifest:
    """A manifest with one more GGUF level, or another entry of one; levels are in the order of their names."""
    return {**data, "levels": dict(sorted({**(data.get("levels") or {}), level: entry}.items()))}


def without_level(data: Manifest, level: str) -> Manifest:
    """A manifest without one of its GGUF levels."""
    return {**data, "levels": {name: entry for name, entry in data["levels"].items() if name != level}}


def with_loads(data: Manifest, loads: Mapping[str, str]) -> Manifest:
    """A manifest that says in which consumers the branch loaded: outcome by consumer."""
    return {**data, "loads_in": dict(loads)}


def _sound(folder: Path, data: Manifest) -> bytes:
    """The manifest's bytes, which :func:`read_manifest` will take."""
    text = as_json(data)
    wrong = problem(json.loads(text))
    if wrong is not None:
        raise BuildError(f"{folder / MANIFEST_NAME}: would not be sound, so it was not written: {wrong}")
    return text


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished branch, or None where there is none that can be read."""
    path = folder / MANIFEST_NAME
    try:
        if not path.is_file() or stray(path, folder) is not None or path.stat().st_size > MOST_BYTES:
            return None
        data: Manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if problem(data) is None else None


def described_files(data: Manifest) -> dict[str, FileEntry]:
    """Every file that a sound manifest names, a branch's, a level's or the importance matrix, by name."""
    parts = [data, data.get("imatrix") or {}, *(data.get("levels") or {}).values()]
    return {name: entry for part in parts for name, entry in (part.get("files") or {}).items()}


def is_complete(folder: Path, data: Recorded) -> bool:
    """Whether all files of the manifest are there in their full size."""
    try:
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]
            for name, entry in data["files"].items()
        )
    except (OSError, KeyError, TypeError):
        return False
