"""From which model each repo's folder in a dist was built, as far as manifests cannot tell.

A manifest names no folder of the machine, so of two local models in folders of one name it says the same. What tells
them apart is remembered beside the finished work, in a file that never leaves the machine; and there too as a hash, not
as a path. Older versions wrote it into the lock file, where it is still found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from quantize.dist.layout import LOCK, ORIGINS, WORK_FOLDER, Dist

MOST_BYTES = 1_000_000


def read_origins(dist: Path) -> dict[str, str]:
    """What is remembered, by the name of the repo's folder; empty where nothing is, as in a dist of an older version."""
    work = dist / WORK_FOLDER
    found = _read(work / ORIGINS)
    return _read(work / LOCK) or {} if found is None else found


def _read(path: Path) -> dict[str, str] | None:
    """What a file remembers; None where it is none of ours."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))["origins"]
        return {repo: origin for repo, origin in found.items() if isinstance(origin, str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def remember_origins(held: Dist, origins: Mapping[str, str]) -> None:
    """Remember them, beside what is remembered of other repos."""
    before = read_origins(held.folder)
    now = dict(sorted({**before, **origins}.items()))
    if now != before:
        held.write(held.work / ORIGINS, json.dumps({"origins": now}).encode() + b"\n")
