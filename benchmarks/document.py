"""The tables' document: every benchmark rewrites its own section, between two marks, and leaves the rest."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from benchmarks.child import THREADS

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def machine(*packages: str) -> str:
    """One line that says what a table was measured on."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", *packages))
    return f"{THREADS} threads, {platform.machine()} with {os.cpu_count()} cores, {versions}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_section(name: str, text: str, document: Path = DOCUMENT) -> None:
    """Put ``text`` between the marks of ``name``; a section not yet there is added at the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = document.read_text(encoding="utf-8")
    section = f"{begin}\n{text.strip()}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    whole = pattern.sub(lambda match: section, whole) if begin in whole else f"{whole.rstrip()}\n\n{section}\n"
    document.write_text(whole, encoding="utf-8")
    print(f"\n{text.strip()}\n", flush=True)
