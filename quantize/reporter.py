"""What long work says while it runs, and how long its stages take.

Whatever takes time is handed one :class:`Reporter`. This base class says nothing, which suits a library call; the
command line brings reporters for people, for machines (JSON lines) and for ``--quiet``. Imports nothing heavy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
"""Moves a progress display forward by so many units."""


class Reporter:
    """Keeps the time of stages and shows nothing.

    Attributes:
        seconds: wall-clock time by stage, without that of stages nested inside it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._nested = 0.0  # seconds of the stages that ended inside the present one

    def say(self, line: str) -> None:
        """One line about what happens now."""

    def progress(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """Show how far work has come, of ``total`` units of which ``done`` are finished already."""
        return self._silent()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the stage ``name``."""
        start = time.perf_counter()
        outer, self._nested = self._nested, 0.0
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._nested
            self._nested = outer + whole

    @staticmethod
    @contextmanager
    def _silent() -> Iterator[Advance]:
        yield lambda count: None


class Silent(Reporter):
    """Says nothing and keeps no time, so that any number of calls can share it."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield


SILENT = Silent()
"""For calls that nobody watches."""
