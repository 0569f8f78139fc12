"""How the process ends: exit codes, signals, a shortage of memory, and defects. Only the console script uses it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

import click

from quantize.cli.reporting import is_debugging
from quantize.cli.supervision import check_room, supervised, under_limits
from quantize.errors import (
    FAILED,
    MOST_MESSAGE,
    WRONG_INPUT,
    OutOfMemoryError,
    QuantizeError,
    is_memory_shortage,
    printable,
    shortened,
)
from quantize.files.cache import cache_error
from quantize.files.limits import memory_limits

RESUMABLE = {"build", "measure"}
"""Commands that leave finished work where it is when they are stopped, and go on from it."""
LIGHT = {None, "recipes", "validate"}
"""Commands that load no large library."""
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. Like Ctrl-C, it passes everything that handles errors."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def run(command: click.Command) -> int:
    """Run the command line's arguments and say how it ended; returns the exit code.

    What is neither a user's mistake nor a fault of the machine is a defect: it is raised.
    """
    sys.excepthook = _report_defect
    sys.unraisablehook = _report_unraisable
    return supervised(lambda: _run_here(command))


def _run_here(command: click.Command) -> int:
    stopped: list[int] = []
    try:
        with _signals(stopped):
            if memory_limits() and _invoked() not in LIGHT:
                check_room()
            return _invoke(command)
    except QuantizeError as error:
        if is_debugging():
            traceback.print_exc()
        return _said(f"error: {error}", error.exit_code)
    except click.ClickException as error:
        lines = error.format_message().expandtabs().splitlines()
        message = shortened("\n".join(map(printable, lines)), MOST_MESSAGE)
        context = error.ctx if isinstance(error, click.UsageError) else None
        click.UsageError(message, context).show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        # CPython notes an interrupt inside exec() of a string (a dataclass being made) and, handled or not, ends
        # `python -m quantize` by SIGINT in place of our exit code; the next such exec() clears the note
        exec("")
        if not stopped and isinstance(error.__context__, EOFError):
            return _said("\nerror: there is no input to confirm with; add --yes to go ahead unasked", WRONG_INPUT)
        signum = stopped[0] if stopped else signal.SIGINT
        by = f" by {signal.Signals(signum).name}" if stopped else ""
        if _invoked() in RESUMABLE:
            return _said(f"interrupted{by}; finished branches are untouched", 128 + signum)
        return _said(f"aborted{by}", 128 + signum)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except BaseException as error:  # a panic of a library is no Exception
        if stopped:  # the terminal went away with the signal, and nothing more can be said on it
            return 128 + stopped[0]
        if (unusable := cache_error(error)) is not None:
            return _said(f"error: {unusable}", unusable.exit_code)
        if not (is_memory_shortage(error) or (memory_limits() and _is_broken_off(error))):
            raise
        return _said(f"error: {OutOfMemoryError(_shortage(error))}", FAILED)


def _invoke(command: click.Command) -> int:
    try:
        result = command.main(standalone_mode=False)
    except SystemExit as end:  # a check whose answer is "no"
        return end.code if isinstance(end.code, int) else FAILED
    return result if isinstance(result, int) else 0


def _invoked() -> str | None:
    """The name of the command that the arguments call."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), None)


def _said(line: str, code: int) -> int:
    with suppress(OSError):  # after SIGHUP there is no terminal any more
        click.echo(line, err=True)
    return code


def _is_broken_off(error: BaseException | None) -> bool:
    """Whether an extension module failed without saying why, which under a limit is a refused allocation."""
    while error is not None:
        if isinstance(error, SystemError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _shortage(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"not enough memory ({reason}){under_limits()}; allow more, give the build a smaller budget with --memory, "
        "or build fewer branches at once with --only. Finished work is kept"
    )


@contextmanager
def _signals(stopped: list[int]) -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the process as Ctrl-C does; one that is ignored (nohup) stays so."""

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)
        raise Stopped(signum)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in STOPPING:
            if signal.getsignal(signum) == signal.SIG_DFL:
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Say what Python could not raise, as in a finalizer; under a limit a shortage there is followed by one that it
    can raise, which is then said in a sentence."""
    if not (memory_limits() and unraisable.exc_value is not None and is_memory_shortage(unraisable.exc_value)):
        sys.__unraisablehook__(unraisable)


def _report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    print(
        "error: this is a bug in quantize, not a mistake of yours; please report it with the lines above",
        file=sys.stderr,
    )
