"""Hashes of a source's files and of the tensors in them, remembered. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.files import digest
from quantize.formats.safetensors_digests import Fingerprint, fingerprint

_read_here: dict[str, str] = {}
"""SHA-256 of files that this process has really read, by :func:`digest.identity_of`."""
_seen_here: dict[str, set[str]] = defaultdict(set)
"""Tensors of a file that this process has read and found to be right, by the file's identity."""


def cached_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a safetensors file, remembered for as long as it seems untouched.

    Raises:
        OSError, ValueError: as :func:`fingerprint`. SourceError: it is being written to.
    """

    def find(real: Path) -> Mapping[str, Any]:
        found = fingerprint(real)
        _read_here[digest.identity_of(real)] = found.sha256
        return {"sha256": found.sha256, "tensors": found.tensors}

    known = digest.remembered(path, find, {"sha256", "tensors"})
    return Fingerprint(str(known["sha256"]), dict(known["tensors"]))


def cached_sha256(path: Path) -> str:
    """As :func:`digest.cached_sha256`; of a safetensors file its tensors' hashes are found in the same reading."""
    if path.suffix == ".safetensors":
        return cached_fingerprint(path).sha256
    return digest.cached_sha256(path)


def note_tensor(identity: str, name: str, whole: Fingerprint) -> None:
    """Note that a tensor was read and is right; a file all of whose tensors are has been read as a whole."""
    seen = _seen_here[identity]
    seen.add(name)
    if len(seen) == len(whole.tensors):
        _read_here[identity] = whole.sha256


def really_read_sha256(path: Path) -> str:
    """SHA-256 of a file as this process has read it, since which it was not touched; else it is read now."""
    real = path.resolve()
    identity = digest.identity_of(real)
    if identity not in _read_here:
        _read_here[identity] = digest.sha256_of_file(real)
    return _read_here[identity]
