"""The prompt template of a card: the recipe's, or the tokenizer's chat template rendered for one user message."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.files.child import ChildFailed, Task, run_child
from quantize.publishing.source_card import is_text, read_start

PLACE = "{prompt}"
SECONDS = 30.0
"""Wall-clock limit in seconds; the child's own limit is on CPU time."""
LIMITS = {"RLIMIT_CPU": 4, "RLIMIT_AS": 2**30, "RLIMIT_FSIZE": 0}
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
MOST_TEMPLATE, MOST_SETTINGS = 1_000_000, 20_000_000
"""Largest chat template and ``tokenizer_config.json`` that are read, in bytes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt template.

    Attributes:
        text: with ``{prompt}`` for the user's message; None if there is none that can be shown.
        reason: why there is none, worded by us for the card; None also if there is no chat template.
    """

    text: str | None = None
    reason: str | None = None


def prompt_template(folder: Path | None) -> str | None:
    """The text of :func:`find_prompt`."""
    return find_prompt(folder).text


def find_prompt(folder: Path | None) -> Prompt:
    """Render a tokenizer's chat template for one user message.

    The template is untrusted code: it runs in Jinja's sandbox, in a process with limits on time and memory
    (``worker_prompt.py``). A template that fails counts as none, and so does one whose output varies.
    """
    settings = _read_json(folder / "tokenizer_config.json") if folder else {}
    source = settings.get("chat_template")
    if folder and (folder / "chat_template.jinja").is_file():
        source = read_start(folder / "chat_template.jinja", MOST_TEMPLATE)
    if isinstance(source, list):  # several, by name
        named = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        return Prompt(reason=None if source is None else "it is no text")
    if len(source) >= MOST_TEMPLATE:
        return Prompt(reason=f"it is longer than {MOST_TEMPLATE:,} characters")
    tokens = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return _rendered(json.dumps({"template": source, "place": PLACE, "tokens": tokens}))


@functools.lru_cache
def _rendered(request: str) -> Prompt:
    """A template's output, cached because every card of a release needs the same one."""
    first = _rendered_once(request)
    if first.text is None:
        return first
    second = _rendered_once(request)  # a new process has other addresses, random numbers and set orders
    return first if second == first else Prompt(reason="it says something else each time")


def _rendered_once(request: str) -> Prompt:
    worker = Path(__file__).with_name("worker_prompt.py")
    try:
        said = run_child(Task(worker, json.loads(request), seconds=SECONDS, limits=LIMITS))
    except ChildFailed as error:  # killed at one of its limits, or for lack of memory
        return Prompt(reason="it takes too long, or too much memory" if error.code < 0 else "it cannot be rendered")
    text = said.get("text")
    if text is not None and (not is_text(text) or ADDRESS.search(text)):
        return Prompt(reason="it prints an object, or what is no text")
    return Prompt(text, said.get("reason"))


def prompt_as_python(template: str | None) -> str:
    """A Python expression that fills ``prompt`` into the template, safe for any text in it."""
    if not template or PLACE not in template:
        return "prompt"
    before, _, after = template.partition(PLACE)
    parts = [repr(before)] * bool(before) + ["prompt"] + [repr(after)] * bool(after)
    return " + ".join(parts)


def _token(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_start(path, MOST_SETTINGS))
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
