"""Names of files that come from outside."""

from __future__ import annotations


def is_file_name(name: str) -> bool:
    """Whether a relative name with ``/`` stays inside its folder and can be printed."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))
