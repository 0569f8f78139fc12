"""A resolved source model: its files, hashes and origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from quantize.errors import SourceChanged, SourceError
from quantize.formats.safetensors_digests import Fingerprint
from quantize.source.checkpoint import Checkpoint, is_carried_over, non_weight_files
from quantize.source.fingerprints import cached_fingerprint, cached_sha256


@dataclass(frozen=True)
class Source:
    """A resolved source model.

    Attributes:
        named: the source as written in the recipe.
        short_name: the model's name in repo names: the last part of the id, folder or file name.
        checkpoint: config and tensor table; ``checkpoint.folder`` is None if only headers were fetched.
        commit: the hub commit, if there is one.
        hub_id: the hub id, if there is one.
        base_model: the hub id of the original that a release is derived from: the recipe's, else ``hub_id``.
        origin: what a converted source was converted from, for the manifest (GGUF file name and SHA-256).
        remote_hashes: hash by file name as reported by the hub (SHA-256 of LFS files, ``git:`` and the blob id of
            others), so that planning from headers and building from files see the same source.
        small_files: a folder with all files except the weights, if only those were fetched.
        known_fingerprints: fingerprints of the weights computed in another process, which are not computed again.
    """

    named: str
    short_name: str
    checkpoint: Checkpoint
    commit: str | None = None
    hub_id: str | None = None
    origin: dict[str, str] | None = None
    remote_hashes: dict[str, str] | None = None
    small_files: Path | None = None
    base_model: str | None = None
    known_fingerprints: Mapping[str, Fingerprint] | None = None

    @property
    def folder(self) -> Path:
        if self.checkpoint.folder is None:
            raise SourceError(f"{self.named}: only its headers have been read")
        return self.checkpoint.folder

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Hash of every file that determines the artefacts: weights, config and all files copied unchanged."""
        if self.remote_hashes is not None:
            return self.remote_hashes
        names = [*self.checkpoint.shards, "config.json", *non_weight_files(self.folder)]
        return {name: cached_sha256(self.folder / name) for name in sorted(set(names))}

    @cached_property
    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """Fingerprints of the weights' files, by file name.

        Raises:
            SourceError: a file cannot be read, or differs from its hash in :attr:`hashes`.
        """
        if self.known_fingerprints is not None:
            return self.known_fingerprints
        found = {}
        for name in self.checkpoint.shards:
            path = self.folder / name
            try:
                found[name] = cached_fingerprint(path)
            except (OSError, ValueError) as error:
                raise SourceError(f"{path}: can no longer be read: {error}") from None
            wanted = self.hashes[name]
            if not wanted.startswith("git:") and found[name].sha256 != wanted:
                raise SourceChanged(f"{path}: changed after it was hashed; start again")
        return found

    def for_other_processes(self) -> Source:
        """A copy for other processes, where files are checked against the hashes taken in this one."""
        return replace(
            self,
            checkpoint=replace(self.checkpoint, folder=self.folder.absolute()),
            remote_hashes=self.hashes,
            known_fingerprints=self.fingerprints,
        )

    @property
    def carried_over(self) -> list[str]:
        """Names of the files that are copied into every branch unchanged."""
        return [name for name in self.hashes if is_carried_over(name)]


def safe_name(text: str) -> str:
    """Reduce a name from outside to characters that are valid in the name of a repo or folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")
    return re.sub(r"([.-])\1+", r"\1", name) or "model"
