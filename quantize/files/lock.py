"""An exclusive lock on a file, which the system releases when the process that holds it ends, however it ends."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class LockHeld(Exception):
    """Another process, or another part of this one, holds the lock."""


class LocksUnsupported(Exception):
    """The file's filesystem has no locks. Its text is the system's reason."""


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created where it is missing and stays. It is not waited for.

    What is in the file is neither read nor promised to survive on every system, so nothing should be kept in it.

    Raises:
        LockHeld: somebody holds it. LocksUnsupported: its filesystem has no locks.
        OSError: the file cannot be opened for writing.
    """
    from filelock import FileLock, Timeout

    # no lock by a file's existence in place of a missing one: it would outlive a process that is killed
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise LockHeld(str(path)) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise LocksUnsupported(error.strerror) from None
        raise
    try:
        yield
    finally:
        lock.release()
