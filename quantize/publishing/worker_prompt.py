"""Child process: render a chat template for one user message; imports nothing from quantize.

Keys of the arguments: ``template``; ``place``, the placeholder for the user's message; ``tokens``, special tokens by
name. The answer is ``{"text": ...}``, or ``{"reason": ...}`` if the template has no output that can be shown.

The template is an untrusted program. Jinja's sandbox protects Python's objects, but does not limit time or memory, so
it runs in a process with small limits on both. It may print plain values only: other Python objects print their memory
address, which differs in every run.
"""

from __future__ import annotations

import json
from typing import Any

MOST_CHARACTERS = 4000
"""Limit of a rendered template, which the card shows in full."""
PLAIN = (str, int, float, bool, type(None))


class ObjectPrinted(ValueError):
    """A template prints something other than text, numbers, lists and mappings."""


def run(arguments: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(arguments["template"], arguments["place"], arguments["tokens"])
    except MemoryError:
        return {"reason": "it needs too much memory"}
    except ObjectPrinted as error:
        return {"reason": str(error)}
    except Exception as error:  # a template can raise anything
        return {"reason": f"it fails for one user message ({type(error).__name__})"}
    if arguments["place"] not in text:
        return {"reason": "it does not show the user's message"}
    if len(text) >= MOST_CHARACTERS:
        return {"reason": f"it makes more than {MOST_CHARACTERS} characters of one message"}
    return {"text": text}


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
    """The value to print, if it is plain."""
    from jinja2 import Undefined
    from markupsafe import Markup

    def is_plain(part: Any) -> bool:
        if type(part) in (list, tuple):
            return all(map(is_plain, part))
        if type(part) is dict:
            return all(map(is_plain, (*part, *part.values())))
        return type(part) in PLAIN or type(part) is Markup

    if not is_plain(value) and not isinstance(value, Undefined):
        raise ObjectPrinted(f"it prints an object ({type(value).__name__})")
    return value


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _refuse(message: str) -> None:
    raise ValueError(message)
