"""Read the source's own card: front matter, text, and links made absolute.

All of it is untrusted, and nothing in it may break a release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

HUB = "https://huggingface.co"
MOST_TEXT = 200_000  # characters of an original card that are appended
MOST_FRONT = 100_000  # characters of front matter, for which PyYAML needs two seconds
MOST_ITEMS = 200  # of a list in the front matter
MOST_VALUES = 50_000  # of front matter with aliases expanded; ten lines of YAML can expand to a billion
MOST_DEPTH = 50
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4")

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MARKDOWN = re.compile(r"(\]\(\s*<?)([^)\s>]+)")
_HTML = re.compile(r"""(\b(?:src|href)\s*=\s*["'])([^"']+)""", re.IGNORECASE)


def front_matter(text: str) -> tuple[dict[str, Any] | None, str]:
    """Front matter of a card, None if it is missing or broken, and the text below it.

    All front matter is read here, so that the number of its values, with aliases expanded, is always bounded.
    """
    import yaml

    match = _FRONT.match(text)
    if not match:
        return None, text

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Leave merge keys (``<<``) alone, so that the loader refuses them: nested merges can grow without end."""

        def get_single_node(self) -> yaml.Node | None:
            node: yaml.Node | None = super().get_single_node()
            if node is not None and _values(node, {}, MOST_DEPTH) > MOST_VALUES:
                raise yaml.YAMLError("too many values")
            return node

    try:
        front = yaml.load(match[1], Loader) if len(match[1]) <= MOST_FRONT else None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
        front = None  # raised by the loader if a tag does not fit its value
    return front if isinstance(front, dict) else None, text[match.end() :]


def _values(node: Any, known: dict[int, int], depth: int) -> int:
    """Number of values of a YAML node with aliases expanded, counted without expanding them.

    Raises:
        RecursionError: it is nested deeper than ``depth``, for example because it contains itself.
    """
    if not depth:
        raise RecursionError
    if id(node) not in known:
        parts = node.value if isinstance(node.value, list) else []  # a scalar's value is a string
        inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_values(part, known, depth - 1) for part in inner)
    return known[id(node)]


def source_card(folder: Path | None) -> tuple[dict[str, Any], str]:
    """Front matter and text of the README in ``folder``; empty if missing or broken."""
    text = read_start(folder / "README.md", 4 * (MOST_FRONT + MOST_TEXT)) if folder else ""
    front, body = front_matter(text)
    return front or {}, _shortened(body)


def read_start(path: Path, most: int) -> str:
    """At most ``most`` bytes of a file as text; empty if there is no file."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(most).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string without lone surrogates, which YAML and JSON can contain but files cannot."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def text_of(front: Mapping[str, Any], key: str) -> str | None:
    """A plain, one-line string of the front matter, or None."""
    value = front.get(key)
    return " ".join(value.split())[:500] or None if is_text(value) else None


def texts_of(front: Mapping[str, Any], key: str) -> list[str]:
    """A list of plain strings of the front matter; a single one counts as a list of one."""
    value = front.get(key)
    items = value if isinstance(value, list) else [value]
    return [" ".join(item.split())[:200] for item in items[:MOST_ITEMS] if is_text(item) and item.strip()]


def absolute_links(text: str, hub_id: str, revision: str) -> str:
    """Replace relative links and images of a card by links to its original repo."""

    def fixed(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#|/", target):
            return match[0]
        kind = "resolve" if target.split("?")[0].lower().endswith(IMAGES) else "blob"
        return f"{match[1]}{HUB}/{hub_id}/{kind}/{revision}/{target.removeprefix('./')}"

    return _HTML.sub(fixed, _MARKDOWN.sub(fixed, text))


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT].rsplit("\n", 1)[0] + "\n\n(shortened)"
