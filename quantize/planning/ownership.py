"""Whether a repo's folder in dist contains a release of this source, or of another model with the same name.

Two sources are the same model if their recorded weights have the same hashes, wherever they are; if they have the same
hub id, at any commit; or if they are the same local folder or file, whatever its present content, because a model that
was trained further is the ordinary case. If an older dist records no more, one common file suffices.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.dist.manifest import read_manifest
from quantize.dist.origins import read_origins
from quantize.errors import shortly
from quantize.source.resolved import Source


def other_owner(folder: Path, source: Source) -> str | None:
    """A short description of the other model whose release is in ``folder``; None if there is none.

    Args:
        folder: a repo's folder, ``dist/<repo>``.
    """
    if not folder.is_dir():
        return None
    origin = read_origins(folder.parent).get(folder.name)
    for branch in sorted(folder.iterdir()):
        if branch.name.startswith(".") or branch.is_symlink() or not branch.is_dir():
            continue
        recorded = (read_manifest(branch) or {}).get("source")
        if isinstance(recorded, Mapping) and not _is_same(recorded, origin, source):
            return _described(recorded)
    return None


def origin_of(source: Source) -> str:
    """What distinguishes a source from others of the same name: its hub id or package, or a hash of its path."""
    if source.hub_id:
        return f"hub:{source.hub_id.lower()}"
    if source.named.startswith("package:"):
        return source.named
    real = os.path.realpath(os.path.expanduser(source.named))
    return f"path:{hashlib.sha256(os.fsencode(real)).hexdigest()}"


def described(source: Source) -> str:
    """The source's description in messages that compare it with another."""
    weights = sorted(source.hashes[name] for name in source.checkpoint.shards if name in source.hashes)
    return f"{source.named} (weights {weights[0][:12]})" if weights else source.named


def _is_same(recorded: Mapping[str, Any], origin: str | None, source: Source) -> bool:
    files = recorded.get("files")
    there = files if isinstance(files, Mapping) else {}
    weights = {str(digest) for name, digest in there.items() if str(name).endswith(".safetensors")}
    ours = {source.hashes.get(name) for name in source.checkpoint.shards}
    if weights and weights == ours:
        return True
    hub_id = recorded.get("name") if recorded.get("commit") else None
    if isinstance(hub_id, str) and source.hub_id:
        return hub_id.lower() == source.hub_id.lower()
    if origin is not None:
        return origin == origin_of(source)
    return not there or any(source.hashes.get(name) == digest for name, digest in there.items())


def _described(recorded: Mapping[str, Any]) -> str:
    name, commit, files = recorded.get("name"), recorded.get("commit"), recorded.get("files")
    words = shortly(name)
    if commit:
        return f"{words} of the hub"
    weights = sorted(
        str(digest) for file, digest in (files.items() if isinstance(files, Mapping) else ())
        if str(file).endswith(".safetensors")
    )  # fmt: skip
    return f"{words} in another folder" + (f" (weights {shortly(weights[0][:12])[1:-1]})" if weights else "")
