"""Versions that results depend on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from quantize import __version__


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of this package, Python, and ``packages``."""
    return {
        "quantize": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
