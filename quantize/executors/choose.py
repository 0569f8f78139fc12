"""Which executor a build runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from quantize.executors.api import Executor
from quantize.executors.local import LocalExecutor
from quantize.reporter import Reporter


@contextlib.contextmanager
def open_executor(address: str | None, reporter: Reporter) -> Iterator[Executor]:
    """This process where ``address`` is None, else the workers of a Ray cluster there; ``auto`` is a running one, or
    one on this machine for the time being.

    Raises:
        BuildError: Ray is not installed, or there is no such cluster.
    """
    if address is None:
        yield LocalExecutor()
        return
    from quantize.executors.ray_driver import connected

    with connected(address, reporter) as executor:
        yield executor
