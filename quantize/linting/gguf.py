"""Check GGUF files: complete, correctly named, with tokenizer and chat template.

A file on the hub is checked by name and size only, without a download.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from quantize.formats.gguf_reader import MAGIC, open_gguf
from quantize.linting.card import CHATTY
from quantize.linting.files import LocalFiles, RepoFiles
from quantize.linting.findings import Finding, capped, error, note, warning
from quantize.recipe.levels import LEVELS

PART = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")
LEVEL = re.compile(r"(?i)[-.](" + "|".join(sorted(LEVELS, key=len, reverse=True)) + r")(?:-\d{5}-of-\d{5})?\.gguf$")
HUB_LIMIT = 50_000_000_000


def check_gguf(files: RepoFiles) -> Iterator[Finding]:
    """Every finding about the repo's GGUF files."""
    names = sorted(name for name in files.sizes if name.endswith(".gguf"))
    yield from capped(_check_parts(names))
    for name in names:
        if files.sizes[name] > HUB_LIMIT:
            yield error("too-large", name, "has more than 50 GB, which the hub refuses; split it")
        if files.sizes[name] < len(MAGIC) or files.read(name, 0, len(MAGIC)) != MAGIC:
            yield error("gguf-damaged", name, "is not a GGUF file; upload it again")
        elif isinstance(files, LocalFiles):
            yield from _check_file(files, name)


def _check_parts(names: list[str]) -> Iterator[Finding]:
    stems: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := PART.match(name):
            stems.setdefault((match["stem"], int(match["parts"])), set()).add(int(match["part"]))
    for (stem, parts), there in sorted(stems.items()):
        for part in sorted(set(range(1, parts + 1)) - there):
            yield error("part-missing", f"{stem}-{part:05d}-of-{parts:05d}.gguf", "is missing; upload it")


def _check_file(files: LocalFiles, name: str) -> Iterator[Finding]:
    try:
        reader = open_gguf(files.folder / name)
    except (ValueError, OSError) as problem:
        reason = " ".join(str(problem).split())[:120]
        yield error("gguf-damaged", name, f"cannot be read ({reason or type(problem).__name__}); upload it again")
        return
    if _value(reader, "general.type") in ("imatrix", "mmproj", "adapter"):
        return
    part = PART.match(name)
    if part and int(part["part"]) > 1:
        return  # the metadata is in the first part
    yield from _check_metadata(files, name, reader)


def _check_metadata(files: LocalFiles, name: str, reader: Any) -> Iterator[Finding]:
    if _value(reader, "tokenizer.ggml.model") is None:
        yield error("tokenizer-missing", name, "contains no tokenizer; convert it again")
    if _value(reader, "tokenizer.chat_template") is None and CHATTY.search(files.name):
        yield warning("chat-template", name, "is missing, although the name suggests a chat model")
    if _value(reader, "general.license") is None:
        yield note("licence", f"{name}:general.license", "is missing; the file does not say how it may be used")
    named, kind = LEVEL.search(name), _value(reader, "general.file_type")
    if named and isinstance(kind, int) and kind != LEVELS[named[1].upper()].ftype:
        real = next((level for level, entry in LEVELS.items() if entry.ftype == kind), str(kind))
        yield error("level", name, f"is named {named[1]}, but its file type says {real}")
    if named and LEVELS[named[1].upper()].needs_imatrix and _value(reader, "quantize.imatrix.file") is None:
        yield warning("imatrix", name, f"{named[1]} without an importance matrix is far worse than it could be")


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field is not None and len(field.types) == 1 else None
