"""The finished branches of a plan, ready to publish: each file is checked against its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from quantize.dist.manifest import MANIFEST_NAME, Manifest, described_files, read_manifest
from quantize.errors import ReleaseError
from quantize.files.digest import cached_sha256
from quantize.planning.plan import Plan
from quantize.publishing.picture import FILE, FORMER_FILES
from quantize.reporter import SILENT, Reporter

CARD = "README.md"
CARD_FILES = frozenset({CARD, FILE, *FORMER_FILES})
"""Rewritten by every `quantize card`, so not listed in the manifest."""
SMALL = 1_000_000
"""Largest file, in bytes, that is held in memory until its branch is published, so that it is read once."""
CHUNK = 1 << 20


@dataclass
class LocalFile:
    """A file of a finished branch, with the two hashes by which git and the hub identify files.

    Attributes:
        wanted: SHA-256 from the manifest, or the blob id as ``git:...``; None for a file that is not in the manifest.
        checked: whether its bytes were checked against ``wanted``.
    """

    path: Path
    nbytes: int
    wanted: str | None = None
    checked: bool = False
    _content: bytes | None = field(default=None, repr=False)
    _hashes: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def sha256(self) -> str:
        """From the manifest if it lists the file: sent or not, the bytes are checked against it once."""
        if self.wanted is not None and not self.wanted.startswith("git:"):
            return self.wanted
        if self._hashes is None and self.nbytes > SMALL:
            return cached_sha256(self.path)
        return self.hashes[0]

    @property
    def blob_id(self) -> str:
        return self.hashes[1]

    @property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 and blob id of the file's bytes.

        Raises:
            ReleaseError: they differ from the manifest, or cannot be read.
        """
        if self._hashes is None:
            if self.nbytes <= SMALL:
                self.read()
            else:
                self._hash_in_pieces()
        assert self._hashes is not None
        return self._hashes

    def check(self) -> None:
        """Check the bytes against the manifest, unless they were checked before.

        Raises:
            ReleaseError: they differ, or cannot be read.
        """
        if not self.checked:
            _ = self.hashes

    def read(self) -> bytes:
        """The bytes, checked against the manifest.

        Raises:
            ReleaseError: they differ, or cannot be read.
        """
        if self._content is not None:
            return self._content
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ReleaseError(f"{self.path}: cannot be read: {error.strerror}") from None
        if len(data) != self.nbytes:
            raise self.differs(f"{len(data):,} bytes instead of {self.nbytes:,}")
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        self._take(hashlib.sha256(data).hexdigest(), blob)
        if self.nbytes <= SMALL:
            self._content = data
        return data

    def differs(self, how: str = "another SHA-256") -> ReleaseError:
        """Build the error for bytes that differ from the manifest."""
        return ReleaseError(
            f"{self.path}: differs from {MANIFEST_NAME} ({how}), so it is not what was built; delete this file and run "
            "`quantize build` again, or restore it"
        )

    def _hash_in_pieces(self) -> None:
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)
        try:
            with self.path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK):
                    sha256.update(chunk)
                    blob.update(chunk)
        except OSError as error:
            raise ReleaseError(f"{self.path}: cannot be read: {error.strerror}") from None
        self._take(sha256.hexdigest(), blob.hexdigest())

    def _take(self, sha256: str, blob: str) -> None:
        if self.wanted is not None and self.wanted not in {sha256, f"git:{blob}"}:
            raise self.differs()
        self._hashes, self.checked = (sha256, blob), True


def finished_folders(plan: Plan) -> dict[Path, tuple[str, str]]:
    """The selected branches' folders, each with its repo and branch on the hub.

    Raises:
        ReleaseError: a branch is not built, or stale.
    """
    found: dict[Path, tuple[str, str]] = {}
    for item in plan.everything:
        if item.label not in plan.selected:
            continue
        if item.state != "fresh":
            raise ReleaseError(
                f"{item.label}: {item.state}, {item.why}; run `quantize build` first, or exclude it with --only"
            )
        found[item.folder] = item.repo, item.folder.name
    return found


def files_of(folder: Path) -> dict[str, LocalFile]:
    """The files of a branch's folder by name in the repo, without hidden ones.

    Raises:
        ReleaseError: a file is a link to another folder, whose content must not be published.
    """
    found, inside = {}, folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            if not path.resolve().is_relative_to(inside):
                raise ReleaseError(f"{path}: is a link to outside its branch; put the file itself there, or remove it")
            found[name.as_posix()] = LocalFile(path, path.stat().st_size)
    return found


def checked_files(folder: Path) -> dict[str, LocalFile]:
    """The files of a finished branch, checked against the manifest by name and length; their bytes are not read yet.

    Raises:
        ReleaseError: a file was not written by a build, is missing, or has another length.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ReleaseError(f"{folder}: has no readable {MANIFEST_NAME}; run `quantize build` again")
    files = files_of(folder)
    wanted = accounted(manifest)
    for name, file in files.items():
        if name not in wanted and name not in CARD_FILES and name != MANIFEST_NAME:
            raise ReleaseError(
                f"{file.path}: does not belong to this branch ({MANIFEST_NAME} does not list it), so nothing is "
                "published; move it out of the folder (files that you add on the hub stay there)"
            )
        file.wanted = wanted.get(name)
    for name, entry in described_files(manifest).items():
        if name not in files:
            raise ReleaseError(f"{folder / name}: is missing, but {MANIFEST_NAME} lists it; run `quantize build` again")
        if files[name].nbytes != entry["bytes"]:
            raise files[name].differs(f"{files[name].nbytes:,} bytes instead of {entry['bytes']:,}")
    return files


def accounted(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Hash by name of every file that a valid manifest accounts for: its files, and the source's licence."""
    source = manifest.get("source")
    carried = source.get("files") if isinstance(source, Mapping) else None
    found = {
        name: digest
        for name, digest in (carried.items() if isinstance(carried, Mapping) else ())
        if isinstance(name, str) and isinstance(digest, str) and name.lower().startswith(LICENCE_FILES)
    }
    return found | {name: str(entry["sha256"]) for name, entry in described_files(cast("Manifest", manifest)).items()}


LICENCE_FILES = ("license", "licence", "notice", "use_policy", "copying")
"""Prefixes of the names of licence files, which go into everything derived from the source."""


def check_dist(plan: Plan, reporter: Reporter = SILENT) -> None:
    """Check every file of the finished branches against its manifest, reading each once.

    Raises:
        ReleaseError: a file differs from what was built.
    """
    for folder in dict.fromkeys(item.folder for item in plan.everything):
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        wanted = accounted(manifest)
        for name, file in files_of(folder).items():
            file.wanted = wanted.get(name)
            if file.wanted is not None:
                file.check()
                file._content = None
            elif name not in CARD_FILES and name != MANIFEST_NAME:
                reporter.say(f"{file.path}: does not belong to this branch, so it will not be published")


def commit_message(plan: Plan, branch: str) -> str:
    """Message of the single commit that updates a branch to dist."""
    return f"{plan.recipe.model.name or plan.source.short_name}: {branch}"
