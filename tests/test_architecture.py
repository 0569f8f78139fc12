"""The house keeps its order: imports point one way, and the light parts stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantize

PACKAGE = Path(quantize.__file__).parent
FLOORS = (
    "cli",
    "rebuilding",
    "building",
    "branches",
    "executors",
    "verifying",
    "measuring",
    "linting",
    "publishing",
    "planning",
    "gguf",
    "calibration",
    "source",
    "dist",
    "hub",
    "methods",
    "formats",
    "recipe",
    "engines",
    "files",
)
"""From top to bottom, as docs/architecture.md lists them."""


def imported_floors(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("quantize.")} & set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    allowed = set(FLOORS[FLOORS.index(floor) :])
    for path in (PACKAGE / floor).rglob("*.py"):
        assert imported_floors(path) <= allowed, path


def test_mathematics_and_formats_know_nothing_of_each_other() -> None:
    for floor in ("methods", "formats"):
        for path in (PACKAGE / floor).rglob("*.py"):
            assert imported_floors(path) <= {floor}, path


def test_every_floor_is_listed_and_documented() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(FLOORS)
    checkout = PACKAGE.parent / "docs" / "architecture.md"
    assert re.findall(r"^  (\w+)/ ", checkout.read_text(encoding="utf-8"), re.MULTILINE) == list(FLOORS)


def test_no_file_outgrows_one_reading() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("module", ["quantize.cli", "quantize.planning", "quantize.recipe"])
def test_light_parts_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "quantize":
            submodules = {alias.name for alias in node.names if is_module(f"{node.module}.{alias.name}")}
            found.update(f"{node.module}.{name}" for name in submodules)
            if len(submodules) < len(node.names):
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "quantize")
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    left = {
        name: {other for other in imported_modules(path) if other in names} - {name} for name, path in names.items()
    }
    left["quantize"] = set()  # lends the API's names on demand
    while free := {
        name
        for name, others in left.items()
        if not others & left.keys() or not any(name in others for others in left.values())
    }:
        left = {name: others for name, others in left.items() if name not in free}
    circles = {name: sorted(others & left.keys()) for name, others in left.items()}
    assert circles == {}, circles
