"""Click flags made from the options models, so that each is declared once."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from quantize.errors import PlanError


def model_options(model: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of an options model; it is called with one argument ``options``.

    Raises:
        PlanError: by the command, where a value is not what the model takes.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**arguments: Any) -> Any:
            given = {name: arguments.pop(name) for name in model.model_fields}
            try:
                options = model.model_validate({name: value for name, value in given.items() if value is not None})
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False)[0]
                flag = _flag(str(first["loc"][0]))
                reason = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
                raise PlanError(f"{flag} {first['input']}: {reason}") from None
            return function(options=options, **arguments)

        for name, field in reversed(model.model_fields.items()):
            command = _option(name, field)(command)
        return command

    return decorate


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    settings: dict[str, Any] = {"help": field.description}
    if metavar := extra.get("metavar"):
        settings["metavar"] = metavar
    kind = _without_none(field.annotation)
    if kind is bool and field.default is True:
        return click.option(
            f"{_flag(name)}/--no-{name.replace('_', '-')}", name, default=True, show_default=True, **settings
        )
    if kind is bool:
        settings |= {"is_flag": True, "default": field.default}
    elif typing.get_origin(kind) is Literal:
        settings |= {"type": click.Choice(typing.get_args(kind)), "default": field.default, "show_default": True}
    elif typing.get_origin(kind) is tuple:
        settings["multiple"] = True
        if typing.get_args(kind)[0] is Path:  # of files to read
            settings["type"] = click.Path(exists=True, dir_okay=False, path_type=Path)
    elif kind is Path:  # of a folder to write into
        settings["type"] = click.Path(file_okay=False, path_type=Path)
        if field.default is not None:
            settings |= {"default": str(field.default), "show_default": True}
    else:
        settings["type"] = str  # the model parses and checks it
    return click.option(_flag(name), name, **settings)


def _without_none(annotation: Any) -> Any:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    is_optional = len(parts) < len(typing.get_args(annotation))
    return parts[0] if is_optional and len(parts) == 1 else annotation
