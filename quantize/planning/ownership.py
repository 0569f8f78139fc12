"""Whose release lies in a repo's folder of dist: this source's, or another model's that happens to share its name.

The same model is: one whose weights are recorded with the same hashes, wherever it lies now; on the hub, one of the
same id, at whatever commit; on this machine, one in the same folder or file, whatever it holds now, as a model that was
trained further is the ordinary case. Where a dist of an older version tells no more, one with any file in common.
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
    """The model, in a few words, whose release lies in ``folder`` where it is not ``source``; None where it is free.

    Args:
        folder: a repo's, ``dist/<repo>``.
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
    """What tells a source from others of its name: the hub's id or the package, or a hash of where it lies."""
    if source.hub_id:
        return f"hub:{source.hub_id.lower()}"
    if source.named.startswith("package:"):
        return source.named
    real = os.path.realpath(os.path.expanduser(source.named))
    return f"path:{hashlib.sha256(os.fsencode(real)).hexdigest()}"


def described(source: Source) -> str:
    """The source as messages name it beside another."""
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
