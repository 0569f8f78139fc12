"""What long work says, and to whom: for people, for machines, not at all; and the options that make the flags."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pydantic
import pytest

import quantize
import quantize.api
from quantize.cli import quantize as group
from quantize.reporter import SILENT, Reporter

Command = Callable[..., subprocess.CompletedProcess[str]]


def commands(command: click.Command = group, name: str = "quantize") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its full name."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found
            yield from commands(found, f"{name} {inner}")
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield name, command


@pytest.mark.parametrize(
    ("name", "command"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_can_be_quiet_and_can_be_debugged(name: str, command: click.Command) -> None:
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"-q", "--quiet", "--debug", "--verbose"} <= flags


def test_a_quiet_build_says_nothing_but_its_result(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    result = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "main", "--device", "cpu", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("built  ")


def test_a_quiet_command_still_says_its_error(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    result = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "nothing", "-q")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_debugging_shows_where_an_error_was_raised(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    result = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "nothing", "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.splitlines()[-1].startswith("error: --only 'nothing'")


def test_with_json_every_line_is_an_object(invoke: Command, tiny_recipe: Path, tmp_path: Path) -> None:
    result = invoke("build", tiny_recipe, "--dist", tmp_path / "dist", "--only", "main", "--device", "cpu", "--json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert {event["event"] for event in events} >= {"say", "progress"}
    progress = [event for event in events if event["event"] == "progress" and event["title"] == "blocks"]
    assert [event["done"] for event in progress] == sorted(event["done"] for event in progress)
    assert progress[-1]["done"] == progress[-1]["total"] == 3
    assert json.loads(result.stdout)["built"] == ["gptq/main"]


def test_nested_stages_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("quantize.reporter.time.perf_counter", lambda: now[0])
    reporter = Reporter()
    with reporter.stage("outer"):
        now[0] += 1
        with reporter.stage("inner"):
            now[0] += 4
        now[0] += 2
    assert reporter.seconds == {"outer": 3.0, "inner": 4.0}


def test_the_shared_silent_reporter_remembers_nothing() -> None:
    with SILENT.stage("any"):
        pass
    assert SILENT.seconds == {}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plan", quantize.PlanOptions), ("build", quantize.BuildOptions), ("measure", quantize.MeasureOptions),
        ("rebuild", quantize.RebuildOptions), ("push", quantize.PushOptions), ("verify", quantize.VerifyOptions),
    ],
)  # fmt: skip
def test_each_option_of_the_api_is_a_flag_with_the_same_default(name: str, options: type[pydantic.BaseModel]) -> None:
    command = group.get_command(click.Context(group), name)
    assert command
    context = click.Context(command)
    flags = {parameter.name: parameter for parameter in command.params}
    for field, described in options.model_fields.items():
        default = flags[field].get_default(context)
        given = {field: default} if isinstance(default, str | bool | Path) else {}
        assert getattr(options(**given), field) == described.default, field


def test_options_are_frozen_and_know_their_names() -> None:
    options = quantize.BuildOptions(dist=Path("here"))
    with pytest.raises(pydantic.ValidationError):
        options.device = "cuda"
    with pytest.raises(pydantic.ValidationError, match="Extra inputs"):
        quantize.BuildOptions(dits="here")  # type: ignore[call-arg]


def test_the_package_lends_every_name_of_its_api() -> None:
    assert set(quantize.api.__all__) | {"__version__"} == set(quantize.__all__)
    for name in quantize.api.__all__:
        assert getattr(quantize, name) is getattr(quantize.api, name)
