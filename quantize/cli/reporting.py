"""Reporters of the command line: for people, for machines, and for silence. All of them write to stderr, so that
stdout holds the result alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from quantize.reporter import Advance, Reporter

EVERY = 1.0
"""Seconds between two progress events for machines."""


class TerminalReporter(Reporter):
    """Lines, and a bar where stderr is a terminal."""

    def say(self, line: str) -> None:
        click.echo(line, err=True)

    @contextmanager
    def progress(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        from tqdm import tqdm

        # None: tqdm shows itself on a terminal only
        with tqdm(total=total, initial=done, desc=title, unit=unit, disable=None, leave=False) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance


class JsonReporter(Reporter):
    """One JSON object a line: ``{"event": "say" | "progress" | "stage", ...}``."""

    def say(self, line: str) -> None:
        self._event("say", message=line)

    @contextmanager
    def progress(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        count, last = done, 0.0

        def advance(more: int) -> None:
            nonlocal count, last
            count += more
            now = time.monotonic()
            if count >= total or now - last >= EVERY:
                last = now
                self._event("progress", title=title, done=count, total=total, unit=unit)

        self._event("progress", title=title, done=done, total=total, unit=unit)
        yield advance

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self.seconds.get(name, 0.0)
        with super().stage(name):
            yield
        spent = self.seconds[name] - before
        if spent >= EVERY:  # most stages recur block by block
            self._event("stage", name=name, seconds=round(spent, 2))

    @staticmethod
    def _event(kind: str, **data: object) -> None:
        print(json.dumps({"event": kind, **data}, ensure_ascii=False), file=sys.stderr, flush=True)


def reporter_for(*, as_json: bool, quiet: bool) -> Reporter:
    """The reporter that a command's flags ask for; a quiet one leaves errors alone, which ``main`` prints."""
    if quiet:
        return Reporter()
    return JsonReporter() if as_json else TerminalReporter()
