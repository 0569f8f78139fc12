"""A card's last line shows whether the card was edited after it was written, without any other record."""

from __future__ import annotations

import hashlib
import re

LINE = "<!-- written by quantize; SHA-256 of the text above: {} -->\n"
PATTERN = re.compile(re.escape(LINE).replace(r"\{\}", "([0-9a-f]{64})"))


def sign(text: str) -> str:
    """Add the last line to a card."""
    text = text if text.endswith("\n") else text + "\n"
    return text + LINE.format(hashlib.sha256(text.encode()).hexdigest())


def is_unedited(data: bytes) -> bool:
    """Whether a card is unchanged since :func:`sign`."""
    text = data.decode("utf-8", errors="replace")
    start = text.rstrip("\n").rfind("\n") + 1
    match = PATTERN.fullmatch(text[start:])
    return match is not None and match[1] == hashlib.sha256(text[:start].encode()).hexdigest()


def is_blank(data: bytes) -> bool:
    """Whether a card is the hub's initial one: at most front matter, and no text."""
    text = data.decode("utf-8", errors="replace").strip()
    return re.sub(r"\A---\n.*?\n---\s*", "", text, count=1, flags=re.DOTALL).strip() in {"", "---"}
