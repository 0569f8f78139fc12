"""A group whose commands are imported when they are called, so that ``quantize --help`` is fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from quantize.cli.reporting import output_options


@dataclass(frozen=True)
class Entry:
    """A command that is not imported yet.

    Attributes:
        module: below ``quantize.cli``. summary: its line in the group's help. attribute: in the module, where it is
            not called like the command.
    """

    module: str
    summary: str
    attribute: str | None = None


class SectionedGroup(click.Group):
    """Lists its commands in sections, with whole lines.

    Args:
        sections: entries by command name, by title.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Mapping[str, Entry]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sections = sections
        self._entries = {name: entry for entries in sections.values() for name, entry in entries.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(import_module(f"quantize.cli.{entry.module}"), entry.attribute or cmd_name)
        output_options(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, entries in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()], col_max=12)
