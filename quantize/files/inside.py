"""Which files of a folder that comes from somebody may be read: regular ones, whose bytes lie in that folder.

A link is judged by where it leads in the end, never by its name or its target's: a cloned repo may hold links called
``token`` or ``README.md`` that lead to the user's own files. Links into the same repo of the hub's cache are what that
cache is made of, and allowed where the folder is a snapshot of that very repo.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

CACHED_REPO = re.compile(r"(models|datasets|spaces)--.+")
KINDS = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a device"), (stat.S_ISCHR, "a device"))


def stray(path: Path, folder: Path) -> str | None:
    """Why ``path``, an entry of ``folder``, is not to be read, as in "<path> is a pipe"; None where it may be.

    Both may be reached through links: ``folder`` itself is what the user named.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: links that lead in a circle
        return "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
    if not any(real.is_relative_to(home) for home in homes(folder)):
        return f"is a link to {real}, which is outside the folder"
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return f"is {next((name for test, name in KINDS if test(mode)), 'something else')}, no regular file"


def homes(folder: Path) -> tuple[Path, ...]:
    """Where files of ``folder`` may lie: in it, and for a snapshot of the hub's cache in the same cached repo."""
    real = folder.resolve()
    for above in (real, *real.parents):
        if above.parent.name == "snapshots" and CACHED_REPO.fullmatch(above.parent.parent.name):
            return real, above.parent.parent / "blobs", above.parent
    return (real,)


def sound_files(
    folder: Path, is_wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Path], dict[str, str]]:
    """All files below ``folder`` by relative name, in order, and what must not be read, by name, with the reason.

    Folders that are links are not gone into; one that leads out of ``folder`` is named.

    Args:
        is_wanted: whether files and folders of a relative name are looked at.
    """
    found: dict[str, Path] = {}
    strays: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if not is_wanted(relative):
                continue
            if (reason := stray(path, folder)) is not None:
                strays[relative] = reason
            elif path.is_file():
                found[relative] = path
        folders[:] = [name for name in folders if is_wanted(Path(parent, name).relative_to(folder).as_posix())]
    return {name: found[name] for name in _in_order(found)}, {name: strays[name] for name in sorted(strays)}


def _in_order(names: dict[str, Path]) -> list[str]:
    """Folder by folder, as paths sort."""
    return sorted(names, key=lambda name: name.split("/"))
