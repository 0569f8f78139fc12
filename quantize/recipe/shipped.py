"""The recipes shipped with the package."""

from __future__ import annotations

from pathlib import Path

import quantize


def shipped_folder() -> Path:
    """The folder of the shipped recipes: inside an installed wheel, or at the top of a checkout."""
    package = Path(quantize.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name, such as ``demo`` or ``examples/airoboros-l2-13b-gpt4-m2.0``."""
    folder = shipped_folder()
    return {path.relative_to(folder).as_posix().removesuffix(".yaml"): path for path in sorted(folder.rglob("*.yaml"))}


def find_shipped(name: str) -> Path | None:
    """The file of a shipped recipe, or None. ``demo`` and ``demo.yaml`` both find it."""
    return shipped_recipes().get(name.removesuffix(".yaml"))


def headline(path: Path) -> str:
    """The first comment line of a recipe, which states its purpose."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""
