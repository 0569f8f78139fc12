"""Names of files that come from outside."""

from __future__ import annotations

MOST_NAME, MOST_PATH = 255, 1024
"""Bytes of one name, as file systems take them, and characters of all with their folders."""


def is_file_name(name: str) -> bool:
    """Whether a relative name with ``/`` stays inside its folder, can be printed, and is no longer than may be."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        return False
    return len(name) <= MOST_PATH and all(len(part.encode()) <= MOST_NAME for part in parts)
