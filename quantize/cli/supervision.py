"""Under a limit on memory, the work is done in a child of this process.

Native libraries answer a refused allocation by ending their process without a word (std::terminate, a thread that
cannot be started). The parent, which has loaded none of them, then says in a sentence what happened. Where no limit is
set there is no child.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from quantize.errors import FAILED, OutOfMemoryError
from quantize.files.limits import memory_limits

KILLED = ("SIGABRT", "SIGBUS", "SIGKILL", "SIGSEGV")
"""How a process dies to which memory was refused: by its own libraries, or by the system."""
PR_SET_PDEATHSIG = 1
LIBRARY, THREAD = 176 * 2**20, 40 * 2**20
"""Bytes of address space that numpy takes on being loaded, and beside that for each of its threads."""
PATIENCE = 60
"""Seconds that the child has to end after a signal was passed on to it."""
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGCHLD")


def under_limits() -> str:
    """Names the limits on memory that are set, to stand in a sentence; empty where there are none."""
    limits = " and ".join(map(str, memory_limits()))
    return f" under {limits}" if limits else ""


def supervised(work: Callable[[], int]) -> int:
    """Do the work and return its exit code; in a child where a limit on memory is set."""
    if not memory_limits() or not hasattr(signal, "sigwaitinfo") or not hasattr(os, "fork"):
        return work()
    signals = {getattr(signal, name) for name in SIGNALS}
    sys.stdout.flush()
    sys.stderr.flush()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError:  # no room for one
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return work()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _die_with(parent)
        _end(work)
    try:
        status = _wait(child, signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    signum = os.WTERMSIG(status)
    name = signal.Signals(signum).name
    if name not in KILLED:
        return 128 + signum
    with suppress(OSError):
        print(
            f"error: not enough memory: the process was ended by {name}{under_limits()}; allow more, or build with "
            "less: fewer branches at once (--only), a smaller --memory. Finished work is kept",
            file=sys.stderr,
        )
    return FAILED


def check_room() -> None:
    """Have OpenBLAS take what it needs, or refuse to start: without room it asks for its buffers again and again
    without end.

    Raises:
        OutOfMemoryError: naming the limit.
    """
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    count = int(threads) if threads.isdecimal() else os.cpu_count() or 1
    needed = LIBRARY + count * THREAD
    try:
        mmap.mmap(-1, needed, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # takes no memory, and counts
    except (OSError, ValueError):
        raise OutOfMemoryError(
            f"not enough memory: numpy and its threads ({count}) need {needed / 1e9:.2f} GB{under_limits()}; allow more"
        ) from None
    import numpy

    # OpenBLAS takes its buffers with the first product that is too large to go without, and keeps them: now, as there
    # may be no room for them later
    square = numpy.ones((512, 512), numpy.float32)
    square @ square


def _wait(child: int, signals: set[signal.Signals]) -> int:
    """The child's status at its end. What a terminal sends reaches both of us; what is sent to us alone goes on to it,
    and what is sent again kills it, as does a minute in which it does not end."""
    passed_on: set[int] = set()
    while True:
        found = signal.sigtimedwait(signals, PATIENCE) if passed_on else signal.sigwaitinfo(signals)
        if found is None:  # native code that asks for memory without end hears no signal that can be handled
            os.kill(child, signal.SIGKILL)
            passed_on.clear()
        elif found.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
        elif found.si_code <= 0:  # SI_USER: by kill(), not by the kernel for a terminal
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if found.si_signo in passed_on else found.si_signo)
            passed_on.add(found.si_signo)


def _die_with(parent: int) -> None:
    """See to it that a parent that is killed takes this process with it."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)


def _end(work: Callable[[], int]) -> None:
    """Do the work, then end this process and never return into the parent's code."""
    code = FAILED
    try:
        code = work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
