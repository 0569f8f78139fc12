"""Open a model from the hub client's cache when the hub cannot be reached.

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache; ``trees/COMMIT.json`` lists a commit's files,
and a blob's name is its SHA-256 (LFS) or git blob id, the hashes that the hub reports too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from quantize.errors import SourceError
from quantize.files.atomic import write_atomically
from quantize.formats.names import is_file_name
from quantize.formats.tensors import INDEX_NAME, SINGLE_NAME
from quantize.hub.client import COMMIT_ID, SHA256
from quantize.recipe.schema import Model
from quantize.source.checkpoint import is_carried_over, read_checkpoint, read_index
from quantize.source.fingerprints import cached_sha256
from quantize.source.resolved import Source, safe_name


def open_cached(model: Model, *, weights: bool) -> Source | None:
    """The model's revision from the cache; None if the cache has nothing of it.

    Args:
        weights: whether to check the weights against their hashes.

    Raises:
        SourceError: it is incomplete or damaged.
    """
    root = _root(model)
    commit = _commit(root, model.revision)
    folder = root / "snapshots" / str(commit)
    if commit is None or not folder.is_dir():
        return None
    listed = _listing(root, commit)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shards = _shards(folder, here)
    carried = [name for name in listed or here if is_carried_over(name) and not name.startswith(".")]
    needed = sorted({*shards, *carried, "config.json"})
    missing = next((name for name in needed if name not in here), None)
    if missing:
        raise SourceError(
            f"{model.source}: the hub cannot be reached, and the HF cache has only a part of commit {commit[:12]} "
            f"({missing} is missing); run this once with a network connection, or name a local directory"
        )
    hashes = {name: (listed or {}).get(name) or _hash(folder / name) for name in needed}
    for name in needed if weights else ():
        if SHA256.fullmatch(hashes[name]) and cached_sha256(folder / name) != hashes[name]:
            raise SourceError(f"{folder / name}: its SHA-256 differs from the hub's; delete it and download it again")
    checkpoint = read_checkpoint(folder)
    short = safe_name(model.source.rsplit("/", 1)[-1])
    return Source(model.source, short, checkpoint, commit=commit, hub_id=model.source, remote_hashes=hashes)


def remember(model: Model, commit: str) -> None:
    """Record in the hub's cache which commit a branch or tag points to, as the hub's client does."""
    if COMMIT_ID.fullmatch(model.revision) or not is_file_name(model.revision):
        return
    with contextlib.suppress(OSError):  # a shared, read-only cache works too
        write_atomically(_root(model) / "refs" / model.revision, commit.encode())


def _root(model: Model) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / "--".join(["models", *model.source.split("/")])


def _commit(root: Path, revision: str) -> str | None:
    """The commit that a revision points to, as of the last answer of the hub."""
    if COMMIT_ID.fullmatch(revision):
        return revision
    try:
        commit = (root / "refs" / revision).read_text().strip() if is_file_name(revision) else ""
    except (OSError, ValueError):
        return None
    return commit if COMMIT_ID.fullmatch(commit) else None


def _listing(root: Path, commit: str) -> dict[str, str] | None:
    """Hash of every file of a commit as listed by the hub; None if no listing is cached."""
    try:
        files = json.loads((root / "trees" / f"{commit}.json").read_text(encoding="utf-8"))["files"]
        return {
            name: str(entry.get("lfs_sha256") or f"git:{entry['blob_id']}")
            for name, entry in files.items()
            if is_file_name(name)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _shards(folder: Path, here: set[str]) -> list[str]:
    return sorted(set(read_index(folder / INDEX_NAME).values())) if INDEX_NAME in here else [SINGLE_NAME]


def _hash(path: Path) -> str:
    """A file's hash in the hub's form: from its blob's name, else computed from its bytes."""
    name = path.resolve().name
    if SHA256.fullmatch(name):
        return name
    if COMMIT_ID.fullmatch(name):
        return f"git:{name}"
    if path.suffix == ".safetensors":
        return cached_sha256(path)
    data = path.read_bytes()
    return "git:" + hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
