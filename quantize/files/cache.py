"""The cache: converted sources and remembered file hashes. Everything in it can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$QUANTIZE_CACHE``, or ``quantize`` below the user's cache directory."""
    explicit = os.environ.get("QUANTIZE_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quantize"
