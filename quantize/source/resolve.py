"""Resolve a recipe's model: a folder, a hub id, a GGUF file, or a package that ships one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from quantize.errors import SourceError
from quantize.recipe.schema import REPO_NAME, Model
from quantize.reporter import SILENT, Reporter
from quantize.source import gguf, hub
from quantize.source.checkpoint import read_checkpoint
from quantize.source.resolved import Source, safe_name


def resolve(model: Model, *, weights: bool, small_files: bool = False, reporter: Reporter = SILENT) -> Source:
    """Find the model that a recipe names.

    Args:
        model: the recipe's ``model`` section.
        weights: False reads only the config and tensor headers of a hub model, which suffices for planning.
        small_files: without ``weights``, still fetch all other files of a hub model.
        reporter: gets one line before any slow step.

    Raises:
        SourceError: the model is not found, not reachable, damaged, or cannot be quantized.
    """
    source = _find(model, weights=weights, small_files=small_files, reporter=reporter)
    return replace(source, base_model=model.base_model or source.hub_id)


def _find(model: Model, *, weights: bool, small_files: bool, reporter: Reporter) -> Source:
    named = model.source
    if named.startswith("package:"):
        file = gguf.find_in_package(named.removeprefix("package:"))
        return gguf.open_gguf(file, named, reporter)
    path = Path(os.path.expanduser(named))  # an unknown ~user is left as it is, without an error
    if os.path.isfile(path) and path.suffix == ".gguf":
        return gguf.open_gguf(path, named, reporter)
    if os.path.isdir(path):
        path = path.resolve()
        return Source(named, safe_name(path.name), read_checkpoint(path))
    if named.count("/") <= 1 and all(map(REPO_NAME.fullmatch, named.split("/"))):
        return hub.open_hub(model, weights=weights, small_files=small_files, reporter=reporter)
    raise SourceError(
        f"{named}: no such directory; a source is a local directory, a .gguf file, a hub id org/name, or package:NAME"
    )
