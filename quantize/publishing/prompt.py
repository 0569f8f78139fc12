"""The prompt template of a card: the recipe's, or what the tokenizer's chat template makes of one user message."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from quantize.files.child import ChildFailed, Task, run_child
from quantize.publishing.source_card import is_text, read_start

PLACE = "{prompt}"
SECONDS = 30.0
"""On the clock; the child's own limit is on the processor's time."""
LIMITS = {"RLIMIT_CPU": 4, "RLIMIT_AS": 2**30, "RLIMIT_FSIZE": 0}
MOST_TEMPLATE, MOST_SETTINGS = 1_000_000, 20_000_000
"""Bytes of a chat template, and of a ``tokenizer_config.json``, that are read."""


def prompt_template(folder: Path | None) -> str | None:
    """The chat template of a tokenizer rendered for one user message, with ``{prompt}`` in its place; None without one.

    The template is somebody else's code: it runs in Jinja's sandbox and in a process with limits on its time and
    memory (``worker_prompt.py``), and one that fails counts as none.
    """
    settings = _read_json(folder / "tokenizer_config.json") if folder else {}
    source = settings.get("chat_template")
    if folder and (folder / "chat_template.jinja").is_file():
        source = read_start(folder / "chat_template.jinja", MOST_TEMPLATE)
    if isinstance(source, list):  # several, by name
        named = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str) or len(source) >= MOST_TEMPLATE:
        return None
    tokens = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return _rendered(json.dumps({"template": source, "place": PLACE, "tokens": tokens}))


@functools.lru_cache
def _rendered(arguments: str) -> str | None:
    """What the child makes of a template. Every card of a release asks for the same one."""
    worker = Path(__file__).with_name("worker_prompt.py")
    try:
        text = run_child(Task(worker, json.loads(arguments), seconds=SECONDS, limits=LIMITS))
    except ChildFailed:
        return None
    return text if is_text(text) else None


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
