"""Child process: a chat template rendered for one user message. JSON on stdin, JSON on stdout; imports nothing of ours.

The template is somebody else's program. Jinja's sandbox keeps it from Python's objects, not from running for ever or
from filling the memory, so it gets a process with little of both.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

SECONDS = 2
MEMORY = 2**30
MOST_CHARACTERS = 4000
"""Of a rendered template; a card shows it whole."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    wish = json.load(sys.stdin)
    text = render(wish["template"], wish["place"], wish["tokens"])
    json.dump(text if wish["place"] in text and len(text) < MOST_CHARACTERS else None, sys.stdout)


def render(template: str, place: str, tokens: dict[str, str]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: ""
    environment.filters["tojson"] = _json
    messages = [{"role": "user", "content": place}]
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _refuse(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    main()
