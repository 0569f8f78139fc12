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
    """One JSON object per line: ``{"event": "say" | "progress" | "stage", ...}``."""

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


def output_options(command: click.Command) -> None:
    """Give a command, and those below it, ``--quiet`` and ``--debug``, unless they have them."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            output_options(inner)
    if not any(parameter.name == "quiet" for parameter in command.params):
        command.params += [
            click.Option(
                ["-q", "--quiet", "quiet"], is_flag=True, expose_value=False, callback=_remember,
                help="Print nothing but errors to stderr.",
            ),
            click.Option(
                ["--debug", "--verbose", "debug"], is_flag=True, expose_value=False, callback=_remember,
                help="Show the logs of libraries, and the traceback of an error.",
            ),
        ]  # fmt: skip


def is_debugging() -> bool:
    """Whether the command line asks for tracebacks; known before it is parsed."""
    return any(flag in sys.argv[1:] for flag in ("--debug", "--verbose"))


def reporter() -> Reporter:
    """The reporter that the present command's flags ask for: silent, JSON lines with ``--json``, or for people."""
    context = click.get_current_context()
    found: Reporter | None = context.meta.get(REPORTER)
    if found is None:
        if context.meta.get(_key("quiet")):
            found = Reporter()
        else:
            found = JsonReporter() if context.params.get("as_json") else TerminalReporter()
        context.meta[REPORTER] = found
    return found


def say(line: str) -> None:
    """A line about what happens; it goes to stderr, so that stdout stays the result."""
    reporter().say(line)


def _key(flag: str) -> str:
    return f"{__name__}.{flag}"


REPORTER = _key("reporter")


def _remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    context.meta[_key(str(parameter.name))] = value
