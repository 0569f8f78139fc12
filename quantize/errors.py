"""The errors that a user meets: each is one clear sentence, and its type carries the command line's exit code.

Everything that is not one of these is a defect of ours and keeps its traceback. docs/exit-codes.md has the table.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

DONE, FAILED, WRONG_INPUT, ANSWER_IS_NO = 0, 1, 2, 3
"""Exit codes. FAILED: something went wrong while working. WRONG_INPUT: what was asked for cannot be done as it was
asked. ANSWER_IS_NO: the command is a check, and what it checks does not hold. A signal ends with 128 + its number."""

MOST_SHOWN = 80
"""Characters of a value that a message quotes."""
MOST_WORD = 300
"""Characters of one word (a path, say) in a message; paths of real machines are shorter."""
MOST_QUOTED, MOST_PLACE = 200, 300
"""Characters of what stands in quotes, and of what a message opens with."""
_LONGEST = 100_000
MOST_MESSAGE = 1000
"""Characters of a whole message."""
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
        opening, closing = {dict: ("{", "}"), list: ("[", "]"), tuple: ("(", ")")}.get(type(value), ("{", "}"))
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


_LONG_WORD = re.compile(rf"\S{{{MOST_WORD + 1},}}")
_LONG_QUOTE = re.compile(rf"(['\"])[^'\"]{{{MOST_QUOTED},}}\1")
_LONG_PLACE = re.compile(rf"\A.{{{MOST_PLACE},}}?(?=: )", re.DOTALL)


def _bounded(message: str) -> str:
    """A message with every value in it of a bearable length: words, what stands in quotes, and what stands before the
    first colon, which is a file, a key, or what was asked for."""
    message = _LONG_WORD.sub(lambda found: shortened(found[0], MOST_WORD), message[:_LONGEST])
    message = _LONG_QUOTE.sub(lambda found: shortened(found[0], MOST_QUOTED), message)
    message = _LONG_PLACE.sub(lambda found: shortened(found[0], MOST_PLACE), message)
    return shortened(printable(message), MOST_MESSAGE)


class QuantizeError(Exception):
    """A mistake or a fault that the user can act on. ``str(error)`` is the whole message."""

    exit_code = FAILED

    def __init__(self, message: str) -> None:
        # names and values in it come from outside: it stays one line of a bearable length, and cannot steer the
        # terminal
        super().__init__(_bounded(message))


class RecipeError(QuantizeError):
    """The recipe is wrong. The message opens with the place: ``file:line: key: ...``."""

    exit_code = WRONG_INPUT


class SourceError(QuantizeError):
    """The source model is missing, damaged, or of a kind that cannot be quantized."""

    exit_code = WRONG_INPUT


class SourceUnreachableError(SourceError):
    """The source is on a hub that does not answer; nothing is known to be wrong with it."""

    exit_code = FAILED


class SourceChanged(SourceError):
    """A file of the source is not what it was when its hash was taken. What was made before is sound."""


class PlanError(QuantizeError):
    """Recipe, arguments and model do not fit each other."""

    exit_code = WRONG_INPUT


class CalibrationError(QuantizeError):
    """The text or the tokenizer is missing or unusable, or the forward pass gives unusable numbers."""

    exit_code = WRONG_INPUT


class NotFiniteError(CalibrationError):
    """The forward pass gave NaN or infinity."""


class TextUnreachableError(CalibrationError):
    """The text is on a hub that does not answer."""

    exit_code = FAILED


class ManifestError(QuantizeError):
    """A manifest that was given is none, is damaged, or does not say enough."""

    exit_code = WRONG_INPUT


class SolveError(QuantizeError):
    """A module could not be quantized as the recipe demands."""


class BuildError(QuantizeError):
    """The build could not finish: full disk, a second build in the same dist, a worker that was lost."""


class CacheError(BuildError):
    """The cache cannot be read or written."""


class OutOfMemoryError(QuantizeError):
    """Memory ran out, or a limit on it is too small for what was asked."""


class DamagedBuild(BuildError):
    """What an unfinished build left on the disk is not what it wrote."""


class GgufError(QuantizeError):
    """llama.cpp is missing, cannot convert this model, or was given something that is no importance matrix."""

    exit_code = WRONG_INPUT


class GgufRunError(GgufError):
    """llama.cpp was run and failed, or what it made is not right."""

    exit_code = FAILED


class EngineError(QuantizeError):
    """Another engine is not installed, or cannot run here."""

    exit_code = WRONG_INPUT


class EngineRunError(EngineError):
    """Another engine failed, or its output does not match the plan."""

    exit_code = FAILED


class QualityError(QuantizeError):
    """What was built is measured, and so far from its source that it is damaged. Its files and figures are in place."""


class ReleaseError(QuantizeError):
    """Finished work cannot be released as it lies there: a branch is not built, a file is a link out of it."""

    exit_code = WRONG_INPUT


class ExportError(ReleaseError):
    """git failed, or the place where its repos shall go cannot be written."""

    exit_code = FAILED


class PushError(ReleaseError):
    """The hub refuses, cannot be reached, or holds something else than was expected."""

    exit_code = FAILED


class HubInputError(PushError):
    """What was asked for cannot be right: no address of a hub, no token, a renamed repo, a public one for --private."""

    exit_code = WRONG_INPUT


_CHAIN = 10
_NO_MEMORY = re.compile(
    r"can(?:'|no)t allocate memory|cannot allocate|failed to map segment|cannot map|bad_alloc|out of memory"
    r"|cannot (?:create|allocate) [\w ]*descriptor"
    r"|can't start new thread|unable to allocate|resource temporarily unavailable|paging file",
    re.IGNORECASE,
)
"""What numpy, torch, OpenMP, the dynamic loader and the C library say when memory, or room for a thread, is refused."""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up. What it raises then is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def is_memory_shortage(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came of, says that memory was refused. Libraries say it in many ways."""
    for _ in range(_CHAIN):
        if error is None or isinstance(error, QuantizeError):
            break
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno in {errno.ENOMEM, errno.EAGAIN}
        ):
            return True
        speaks = isinstance(error, RuntimeError | ImportError | SystemError | OSError) or is_panic(error)
        if speaks and _NO_MEMORY.search(str(error)[:10_000]):
            return True
        error = error.__cause__ or error.__context__
    return isinstance(error, OutOfMemoryError)
