"""The errors a user can cause, each one clear sentence; the command line turns them into exit code 2.

Everything that is not one of these is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """A text on one line, with what a terminal would act on spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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


class PlanError(QuantizeError):
    """Recipe and model do not fit each other."""


class CalibrationError(QuantizeError):
    """The calibration text is missing or too short, or the forward pass gave unusable numbers."""


class SolveError(QuantizeError):
    """A module could not be quantized as the recipe demands."""


class BuildError(QuantizeError):
    """The build could not finish: full disk, a second build in the same dist, no such device."""


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
