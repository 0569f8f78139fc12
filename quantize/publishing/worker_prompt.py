"""In a child: a chat template rendered for one user message.

The template is somebody else's program. Jinja's sandbox keeps it from Python's objects, not from running for ever or
from filling the memory, so its process gets little of both. Keys of the arguments: ``template``, ``place`` (what stands
for the user's message), ``tokens`` (special tokens by name).
"""

from __future__ import annotations

import json
import re
from typing import Any

MOST_CHARACTERS = 4000
"""Of a rendered template; a card shows it whole."""
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")


def run(arguments: dict[str, Any]) -> str | None:
    text = render(arguments["template"], arguments["place"], arguments["tokens"])
    if ADDRESS.search(text):
        _refuse("it prints an object's address, which is another in every run")
    return text if arguments["place"] in text and len(text) < MOST_CHARACTERS else None


def render(template: str, place: str, tokens: dict[str, str]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_plain
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: ""
    environment.filters["tojson"] = _json
    messages = [{"role": "user", "content": place}]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


def _plain(value: Any) -> Any:
    """Only data is printed; what a function or an object prints is its address."""
    from jinja2 import Undefined

    if not (value is None or isinstance(value, str | int | float | list | tuple | dict | Undefined)):
        _refuse(f"it prints a {type(value).__name__}")
    return value


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _refuse(message: str) -> None:
    raise ValueError(message)
