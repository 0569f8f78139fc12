"""Seeded mutations of bytes, texts and plain data."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

LONG = "long " * 1000
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", " ", "0", "-1", "abc", "true", "1e9", "../../etc/passwd", "/", "~", "a" * 300, LONG, "\x1b[2J",
    "\n", "ü", "\u202e", "\ud800", "{prompt}", "{{ 7 * 7 }}", "${HOME}", "%s", "<script>", "`x`\n# y", [], [[]], [None],
    {}, {"a": {}}, [1, "a", None], {"": ""}, [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]], "main", "gptq", "awq",
    "gguf", "auto", "F16", "I32",
)  # fmt: skip
TOKENS: tuple[bytes, ...] = (
    b"", b"\x00", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b":", b": ", b"- ", b"&a ",
    b"*a ", b"<<: ", b"!!", b"!!python/object:os.system ", b"---\n", b"...", b"{", b"}", b"[", b"]", b'"', b"'", b"|\n",
    b">\n", b"#", b"%", b"@", b"0x", b"1e999", b"9" * 400, b"NaN", b"null", b"~", b"true", b"\xed\xa0\x80",
    "ü".encode(), "\u2028".encode(), b"\x1b[31m", b"\xff" * 8, b"\x00" * 8, (2**63).to_bytes(8, "little"),
    (10**9).to_bytes(8, "little"), b"GGUF",
)  # fmt: skip


def odd_value(dice: random.Random) -> Any:
    """One of them, of its own: lists are changed further."""
    return copy.deepcopy(dice.choice(ODD_VALUES))


def mutated_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to four changes: a flip, a cut, a token put in, a part twice, moved or missing."""
    for _ in range(dice.randint(1, 4)):
        place, other = dice.randint(0, len(data)), dice.randint(0, len(data))
        kind = dice.randrange(7)
        if kind == 0 and data:
            place = dice.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data = data[:place] + dice.choice(TOKENS) + data[place:]
        elif kind == 3:
            token = dice.choice(TOKENS)
            data = data[:place] + token + data[place + len(token) :]
        elif kind == 4:
            data = data[:place] + data[min(place, other) : max(place, other)][:2000] + data[place:]
        elif kind == 5:
            data = data[: min(place, other)] + data[max(place, other) :]
        else:
            data = data[:place] + dice.randbytes(dice.randint(1, 16)) + data[place:]
    return data


def mutated_data(data: Any, dice: random.Random) -> Any:
    """One to three changes somewhere in nested dicts and lists: a value, a key, an entry more or less."""
    data = copy.deepcopy(data)
    for _ in range(dice.randint(1, 3)):
        places = list(_places(data))
        if not places:
            return odd_value(dice)
        holder, key = dice.choice(places)
        kind = dice.randrange(8)
        if kind == 0 and isinstance(holder, dict):
            holder[dice.choice(("", "x", LONG, "\x1b", str(key).upper(), f"{key} "))] = holder.pop(key)
        elif kind == 1:
            del holder[key]
        elif kind == 2:
            holder[key] = [holder[key]] if dice.random() < 0.5 else {"a": holder[key]}
        elif kind == 3:
            other, name = dice.choice(places)
            with_other = copy.deepcopy(other[name]) if _has(other, name) else None
            holder[key] = with_other
        elif kind == 4 and isinstance(holder[key], int | float) and abs(holder[key]) < 1e300:
            holder[key] = holder[key] * dice.choice((-1, 0, 2, 1000, 1.5)) + dice.choice((0, 1, -1))
        else:
            holder[key] = odd_value(dice)
    return data


def as_json(data: Any, dice: random.Random) -> bytes:
    """Mutated data as JSON text, which in one case of ten is damaged too."""
    text = json.dumps(mutated_data(data, dice), default=str).encode()
    return mutated_bytes(text, dice) if dice.random() < 0.1 else text


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [data]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            for key in keys:
                yield holder, key
                waiting.append(holder[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
