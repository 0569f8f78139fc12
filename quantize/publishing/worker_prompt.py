"""In a child: a chat template rendered for one user message; imports nothing of ours.

Keys of the arguments: ``template``; ``place``, what stands for the user's message; ``tokens``, special tokens by name.
The answer is ``{"text": ...}``, or ``{"reason": ...}`` where the template gives nothing that can be shown.

The template is somebody else's program. Jinja's sandbox keeps it from Python's objects, not from running for ever or
from filling the memory, so it gets a process with little of both. It may print plain values only: what else Python has
shows where it lies in memory, which is another place in every run.
"""

from __future__ import annotations

import json
from typing import Any

MOST_CHARACTERS = 4000
"""Of a rendered template; a card shows it whole."""
PLAIN = (str, int, float, bool, type(None))


class ObjectPrinted(ValueError):
    """A template prints something that is no text, number, list or mapping."""


def run(arguments: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(arguments["template"], arguments["place"], arguments["tokens"])
    except MemoryError:
        return {"reason": "it needs too much memory"}
    except ObjectPrinted as error:
        return {"reason": str(error)}
    except Exception as error:  # whatever a template can do wrong
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
    """What is printed, if it is plain."""
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
