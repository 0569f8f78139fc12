"""A reporter that remembers, and one that prints."""

from __future__ import annotations

from quantize.reporter import Reporter


class Remembering(Reporter):
    """Keeps every line in ``lines``."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Printing(Reporter):
    """Prints every line."""

    def say(self, line: str) -> None:
        print(line, flush=True)
