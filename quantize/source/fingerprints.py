"""Cached hashes of a source's files and tensors. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.files import digest
from quantize.formats.safetensors_digests import Fingerprint, fingerprint

_read_here: dict[str, str] = {}
"""SHA-256 of files that this process has really read, by file identity (:func:`digest.identity_of`)."""
_seen_here: dict[str, set[str]] = defaultdict(set)
"""Names of tensors that this process has read and verified, by file identity."""


def cached_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a safetensors file, cached until the file's identity changes.

    Raises:
        OSError, ValueError: see :func:`fingerprint`. SourceError: the file is being written.
    """

    def find(real: Path) -> Mapping[str, Any]:
        found = fingerprint(real)
        _read_here[digest.identity_of(real)] = found.sha256
        return {"sha256": found.sha256, "tensors": found.tensors}

    known = digest.remembered(path, find, {"sha256", "tensors"})
    return Fingerprint(str(known["sha256"]), dict(known["tensors"]))


def cached_sha256(path: Path) -> str:
    """:func:`digest.cached_sha256`, which for a safetensors file hashes its tensors in the same reading."""
    if path.suffix == ".safetensors":
        return cached_fingerprint(path).sha256
    return digest.cached_sha256(path)


def note_tensor(identity: str, name: str, whole: Fingerprint) -> None:
    """Record that a tensor was read and verified; once all its tensors are, the whole file counts as read."""
    seen = _seen_here[identity]
    seen.add(name)
    if len(seen) == len(whole.tensors):
        _read_here[identity] = whole.sha256


def sha256_read_here(path: Path) -> str:
    """SHA-256 of a file from this process's own reading, if the file is unchanged since; otherwise it is read now."""
    real = path.resolve()
    identity = digest.identity_of(real)
    if identity not in _read_here:
        _read_here[identity] = digest.sha256_of_file(real)
    return _read_here[identity]
