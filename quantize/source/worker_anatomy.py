"""Child process of ``source/anatomy.py``: build an architecture on the meta device and examine it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.errors import SourceError
from quantize.source.anatomy import Anatomy, table_of
from quantize.source.checkpoint import Checkpoint


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Answer with the anatomy, or with the sentence that refuses the source."""
    checkpoint = Checkpoint(arguments["config"], table_of(arguments["tensors"]))
    trust = bool(arguments["trust_remote_code"])
    try:
        found = examined(Path(arguments["folder"]), arguments["named"], checkpoint, trust_remote_code=trust)
    except SourceError as error:
        return {"refused": str(error)}
    return {"anatomy": found.as_data()}


def examined(folder: Path, named: str, checkpoint: Checkpoint, *, trust_remote_code: bool) -> Anatomy:
    """Examine an architecture in this process.

    Raises:
        SourceError: transformers does not support it, or the checkpoint does not fit it.
    """
    import torch

    from quantize.source.architecture import build_empty
    from quantize.source.examine import examine

    model = build_empty(folder, named, checkpoint, torch.float32, trust_remote_code)
    return examine(model, checkpoint.tensors, named).anatomy()
