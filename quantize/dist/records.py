"""An append-only file of what an unfinished build has done: a head, then one line a finished block.

Each line carries its own hash and is flushed before the next block begins, so what a block costs does not grow with the
blocks before it. A last line that is torn is a block that was not finished. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.files.atomic import sync_folder
from quantize.files.sealed import seal, unseal

BLOCKS = "blocks.jsonl"


class Records:
    """The lines of one file.

    Attributes:
        lines: all up to the first that is torn or damaged, the head first.
        fault: what is wrong where others follow that one; None where it was the last, and so never finished.
    """

    def __init__(self, path: Path, lines: Sequence[Any] = (), end: int = 0, fault: str | None = None) -> None:
        self._path, self.lines, self._end, self.fault = path, list(lines), end, fault

    @classmethod
    def read(cls, path: Path) -> Records:
        """The lines of an existing file.

        Raises:
            OSError: there is no such file. ValueError: its head is not what was written.
        """
        data = path.read_bytes().splitlines(keepends=True)
        lines = [unseal(data[0] if data else b"")]
        end, fault = len(data[0]), None
        for number, line in enumerate(data[1:], 2):
            try:
                lines.append(unseal(line))
            except ValueError:
                if number < len(data):
                    fault = f"line {number} of {path.name} is not what was written"
                break
            end += len(line)
        return cls(path, lines, end, fault)

    def append(self, *lines: Any) -> None:
        """Write further lines and flush them.

        Raises:
            OSError: no space; what was there before is untouched.
        """
        data = b"".join(map(seal, lines))
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(file, self._end)  # of a torn line
            view, offset = memoryview(data), self._end
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
            os.fsync(file)
        finally:
            os.close(file)
        if not self._end:
            sync_folder(self._path.parent)
        self._end += len(data)
        self.lines += lines
