"""``quantize engines``: external tools that make branches in place of our solvers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantize.cli.options import gigabytes, json_option, print_json, table
from quantize.cli.reporting import reporter
from quantize.errors import ANSWER_IS_NO

if TYPE_CHECKING:
    from quantize.engines.environment import Environment


@click.group()
def engines() -> None:
    """Other quantizers, run from the same recipe (`engine:`), each in its own environment."""


@engines.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show every engine, what it makes and whether it is installed."""
    rows = [_described(environment) for environment in _environments()]
    if as_json:
        print_json(rows)
        return
    cells = [
        [row["name"], row["version"], ", ".join(row["methods"]), row["needs"], row["state"], row["summary"]]
        for row in rows
    ]
    click.echo(table([["engine", "version", "makes", "needs", "state", ""], *cells]))


@engines.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Create the environment again.")
@click.option(
    "--python", type=click.Path(dir_okay=False),
    help="Use this interpreter, in which the engine is already installed (such as a CUDA build).",
)  # fmt: skip
def install(name: str, force: bool, python: str | None) -> None:
    """Create the environment of engine NAME in the cache, with pinned packages."""
    environment = _environment(name)
    if python:
        environment.adopt(Path(python), reporter())
        return
    environment.install(reporter(), force)
    click.echo(f"{environment.folder}  {gigabytes(environment.nbytes)}")


@engines.command()
@click.argument("name")
@json_option
def check(name: str, as_json: bool) -> None:
    """Import engine NAME in its environment and say whether it can run on this machine; exit code 3 if not."""
    environment = _environment(name)
    by_method = {method: environment.obstacle(method) for method in environment.engine.methods}
    answer = environment.ask() if environment.mark else {}
    if as_json:
        print_json({**_described(environment), "obstacles": by_method, "packages": answer.get("packages")})
    else:
        if answer:
            packages = ", ".join(f"{package} {version}" for package, version in answer["packages"].items() if version)
            device = "a CUDA device" if answer["said"].get("cuda") else "the CPU only"
            click.echo(
                f"{environment.engine.name}: imports, on Python {answer['python']} with {packages}; sees {device}"
            )
        for method, reason in by_method.items():
            click.echo(f"{method.upper()}: {reason or 'can run here'}")
    if all(by_method.values()):
        sys.exit(ANSWER_IS_NO)


def _described(environment: Environment) -> dict[str, Any]:
    engine, mark = environment.engine, environment.mark
    needs = {ability.needs for ability in engine.methods.values()}
    return {
        "name": engine.name,
        "version": environment.identity["version"],
        "methods": list(engine.methods),
        "needs": "CUDA" if needs == {"cuda"} else "CPU",
        "state": "not installed" if mark is None else "own Python" if mark["own"] else "installed",
        "python": mark["python"] if mark else None,
        "summary": engine.summary,
    }


def _environments() -> list[Environment]:
    from quantize.engines import known_engines
    from quantize.planning.engines import environment_of

    return [environment_of(engine) for engine in known_engines().values()]


def _environment(name: str) -> Environment:
    known = {environment.engine.name: environment for environment in _environments()}
    if name not in known:
        raise click.UsageError(f"there is no engine '{name}'; the engines are {', '.join(known)}")
    return known[name]
