"""Who is told in one line what happens."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
