"""From which model each repo's folder in a dist was built, as far as manifests cannot tell.

A manifest names no folder of the machine, so of two local models in folders of one name it says the same. What tells
them apart is remembered beside the finished work, in the lock file, which never leaves the machine; and there too as a
hash, not as a path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from quantize.dist.layout import LOCK, WORK_FOLDER, Dist

MOST_BYTES = 1_000_000


def read_origins(dist: Path) -> dict[str, str]:
    """What is remembered, by the name of the repo's folder; empty where nothing is, as in a dist of an older version."""
    path = dist / WORK_FOLDER / LOCK
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))["origins"]
        return {repo: origin for repo, origin in found.items() if isinstance(origin, str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def remember_origins(held: Dist, origins: Mapping[str, str]) -> None:
    """Remember them, beside what is remembered of other repos."""
    before = read_origins(held.folder)
    now = dict(sorted({**before, **origins}.items()))
    if now != before:
        # written in place: a file that took its place would not be the one that is locked
        with (held.work / LOCK).open("r+b") as file:
            file.truncate(file.write(json.dumps({"origins": now}).encode() + b"\n"))
            file.flush()
            os.fsync(file.fileno())
