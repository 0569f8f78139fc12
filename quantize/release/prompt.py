"""The prompt template of a card: the recipe's, or what the tokenizer's chat template makes of one user message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLACE = "{prompt}"


def prompt_template(folder: Path | None) -> str | None:
    """The chat template of a tokenizer rendered for one user message, with ``{prompt}`` in its place; None without one.

    The template is somebody else's code: it runs in Jinja's sandbox, and one that fails counts as none.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    settings = _read_json(folder / "tokenizer_config.json") if folder else {}
    source = settings.get("chat_template")
    if folder and (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if isinstance(source, list):  # several, by name
        source = next((item.get("template") for item in source if item.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: ""
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    tokens = {name: _token(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        text = environment.from_string(source).render(
            messages=[{"role": "user", "content": PLACE}], add_generation_prompt=True, **tokens
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return text if PLACE in text and len(text) < 4000 else None


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


def _refuse(message: str) -> None:
    raise ValueError(message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
