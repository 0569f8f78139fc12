"""The errors a user can cause, each one clear sentence; the command line turns them into exit code 2.

Everything that is not one of these is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

MOST_SHOWN = 80
"""Characters of a value that a message quotes."""
_DEPTH, _ENTRIES = 3, 8


def printable(text: str) -> str:
    """A text on one line, with what a terminal would act on spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, most: int) -> str:
    """A text of at most ``most`` characters; a longer one has "…" in place of its middle, as its end matters too."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


def shortly(value: Any) -> str:
    """A value that comes from outside, as Python writes it, in at most 80 printable characters.

    What is large or nested is not written out first: it may be of any size, and, by YAML's aliases, of any number of
    entries in a small file.
    """
    return shortened(printable("".join(islice(_written(value, _DEPTH), 4 * MOST_SHOWN))), MOST_SHOWN)


def _written(value: Any, depth: int) -> Iterator[str]:
    """The parts of a value's notation; a caller takes no more of them than it shows."""
    if isinstance(value, str | bytes):
        yield repr(value[: 2 * MOST_SHOWN])
        return
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        yield f"a number of {value.bit_length():,} bits"
        return
    if isinstance(value, dict | list | tuple | set | frozenset):
        opening, closing = {list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
        yield opening
        if value and not depth:
            yield "…"
        else:
            for number, entry in enumerate(value):
                yield ", " if number else ""
                if number == _ENTRIES:
                    yield "…"
                    break
                yield from _written(entry, depth - 1)
                if isinstance(value, dict):
                    yield ": "
                    yield from _written(value[entry], depth - 1)
        yield closing
        return
    if value is None or isinstance(value, bool | int | float | complex):
        yield repr(value)
        return
    yield f"<{type(value).__name__}>"  # its own notation is somebody's code, or holds an address


class QuantizeError(Exception):
    """A mistake or a fault that the user can act on. ``str(error)`` is the whole message."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        # names and values in it come from outside: it stays one line, and cannot steer the terminal
        super().__init__(printable(message))


class RecipeError(QuantizeError):
    """The recipe is wrong. The message opens with the place: ``file:line: key: ...``."""


class SourceError(QuantizeError):
    """The source model is missing, damaged, or of a kind that cannot be quantized."""


class SourceChanged(SourceError):
    """A file of the source is not what it was when its hash was taken. What was made before is sound."""


class PlanError(QuantizeError):
    """Recipe and model do not fit each other."""


class CalibrationError(QuantizeError):
    """The calibration text is missing or too short, or the forward pass gave unusable numbers."""


class SolveError(QuantizeError):
    """A module could not be quantized as the recipe demands."""


class BuildError(QuantizeError):
    """The build could not finish: full disk, a second build in the same dist, no such device."""


class DamagedBuild(BuildError):
    """What an unfinished build left on the disk is not what it wrote."""


class GgufError(QuantizeError):
    """llama.cpp is missing, or its converter or quantizer refuses."""


class EngineError(QuantizeError):
    """A foreign engine is not installed, cannot run here, failed, or gave something that is no such branch."""


class ReleaseError(QuantizeError):
    """Finished work cannot be put where it shall go: a branch is not built, git is missing, a file cannot be linked."""


class PushError(ReleaseError):
    """The hub refuses, or holds something else than was expected."""


class HubInputError(PushError):
    """What was asked for cannot be right: no address of a hub, no token, a renamed repo, a public one for --private."""
