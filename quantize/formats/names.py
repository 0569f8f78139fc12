"""Checks of file names that come from outside."""

from __future__ import annotations

MOST_NAME, MOST_PATH = 255, 1024
"""Limits: bytes of one path component, as in file systems, and characters of the whole path."""


def is_file_name(name: str) -> bool:
    """Whether a relative path with ``/`` stays inside its folder, is printable, and is within the length limits."""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
        return False
    return len(name) <= MOST_PATH and all(len(part.encode()) <= MOST_NAME for part in parts)
