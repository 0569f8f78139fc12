"""Lines of JSON that carry their own SHA-256, so that a torn or damaged one is known for what it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def seal(data: Any) -> bytes:
    """One line: the SHA-256 of the JSON text, a space, the text."""
    text = json.dumps(data, separators=(",", ":")).encode()
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"


def unseal(line: bytes) -> Any:
    """What a line says.

    Raises:
        ValueError: it is torn or damaged.
    """
    digest, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != digest:
        raise ValueError("it is not what was written")
    return json.loads(text)
