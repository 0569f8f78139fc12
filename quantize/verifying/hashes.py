"""Check every file against the manifest: length and SHA-256. On the hub, listed hashes are used without a download."""

from __future__ import annotations

from typing import cast

from quantize.dist.manifest import MANIFEST_NAME, Manifest, described_files
from quantize.dist.manifest_schema import problem
from quantize.files.digest import sha256_of_file
from quantize.linting.files import HubFiles, LocalFiles, RepoFiles
from quantize.verifying.checks import Check


def check_hashes(files: RepoFiles) -> Check:
    """Check every file in the manifest."""
    if MANIFEST_NAME not in files.sizes:
        return Check("hashes", "skipped", f"there is no {MANIFEST_NAME} to check the files against")
    manifest = files.json(MANIFEST_NAME)
    if manifest is None or (wrong_at := problem(manifest)) is not None:
        reason = wrong_at if manifest is not None else "it is not a JSON object"
        return Check("hashes", "failed", f"{MANIFEST_NAME} is not a valid manifest ({reason})")
    entries = described_files(cast("Manifest", manifest))
    wrong, unread = [], 0
    for name, entry in sorted(entries.items()):
        if files.sizes.get(name) != entry["bytes"]:
            wrong.append(f"{name} " + ("is missing" if name not in files.sizes else "has another length"))
            continue
        digest = _sha256(files, name)
        if digest is None:
            unread += 1
        elif digest != entry["sha256"]:
            wrong.append(f"{name} has another SHA-256")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return Check("hashes", "failed", ", ".join(wrong[:3]) + more)
    by_length = f" ({unread} small ones by their length)" if unread else ""
    return Check("hashes", "ok", f"{len(entries)} files are those of the manifest{by_length}")


def _sha256(files: RepoFiles, name: str) -> str | None:
    """A file's SHA-256; None if the hub does not list it."""
    if isinstance(files, LocalFiles):
        return sha256_of_file(files.folder / name)
    return files.sha256.get(name) if isinstance(files, HubFiles) else None
