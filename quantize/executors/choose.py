"""Which executor a build runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from quantize.executors.api import Workers
from quantize.executors.local import Here
from quantize.files.notify import Notify


@contextlib.contextmanager
def open_workers(address: str | None, notify: Notify) -> Iterator[Workers]:
    """This process where ``address`` is None, else the workers of a Ray cluster there; ``auto`` is a running one, or
    one on this machine for the time being.

    Raises:
        BuildError: Ray is not installed, or there is no such cluster.
    """
    if address is None:
        yield Here()
        return
    from quantize.executors.ray_driver import connected

    with connected(address, notify) as workers:
        yield workers
