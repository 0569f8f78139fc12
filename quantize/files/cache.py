"""The cache: converted sources and remembered file hashes. Everything in it can be made again."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from quantize.errors import CacheError

_NATIVE_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust tell the system's error."""


def cache_folder() -> Path:
    """``$QUANTIZE_CACHE``, or ``quantize`` where the system keeps the user's caches.

    On Linux that is ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        CacheError: the user whose folder it is has none.
    """
    explicit = os.environ.get("QUANTIZE_CACHE")
    if explicit:
        found = os.path.expanduser(explicit)
        if found.startswith("~"):
            raise CacheError(f"QUANTIZE_CACHE={explicit}: there is no such user, and so no such folder")
        return Path(found)
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("quantize", appauthor=False)
    except RuntimeError:
        folder = None
    if folder is None or not folder.is_absolute():  # ~ where no home is known
        raise CacheError("this user has no home folder for the cache; set QUANTIZE_CACHE to a folder")
    return folder


def require_cache() -> None:
    """Raises :class:`CacheError` where the cache cannot be written, which a build does from its first kernel on."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cache_error(OSError(error.errno, error.strerror, str(folder))) or error from None


def cache_error(error: BaseException) -> CacheError | None:
    """The sentence for a fault of the file system that lies in the cache; None for every other."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    folder = cache_folder()
    try:
        place = Path(os.path.abspath(os.fsdecode(error.filename)))
    except (TypeError, ValueError):
        return None
    root = Path(os.path.abspath(folder))
    if not (place.is_relative_to(root) or root.is_relative_to(place)):
        return None
    return CacheError(
        f"{folder}: the cache cannot be used ({error.strerror or error}); make it a folder that can be written, with "
        "room on its disk, or set QUANTIZE_CACHE to another one"
    )


def as_os_error(error: Exception, path: Path) -> OSError | None:
    """What a library says of a fault of the file system, as the system says it, with the file's name."""
    match = _NATIVE_ERROR.search(str(error))
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, os.strerror(error.errno), str(path))
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path)) if match else None
