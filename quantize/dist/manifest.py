"""``quantize-manifest.json``: what a branch was made of, how, and how each module came out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.dist.ledger import LedgerEntry
from quantize.dist.manifest_schema import SCHEMA, problem

MANIFEST_NAME = "quantize-manifest.json"
MOST_BYTES = 100_000_000
"""Of a manifest that is read; thirty thousand modules take 6 MB."""


def manifest(
    *,
    branch: str,
    repo: str,
    key: str,
    key_inputs: dict[str, Any],
    source: dict[str, Any],
    calibration: dict[str, Any],
    compute: dict[str, Any],
    versions: dict[str, str],
    tensor_bytes: int,
    files: dict[str, dict[str, Any]],
    ledger: list[LedgerEntry],
    engine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest as plain data. It holds no time, no path of the machine and no name of a user.

    Args:
        engine: name, version and packages of a foreign engine; None for our own solvers.
    """
    return {
        "schema": SCHEMA,
        "repo": repo,
        "branch": branch,
        "key": key,
        "key_inputs": key_inputs,
        "source": source,
        "calibration": calibration,
        "compute": compute,
        "versions": versions,
        **({"engine": engine} if engine else {}),
        "tensor_bytes": tensor_bytes,
        "files": files,
        "ledger": [entry.as_data() for entry in ledger],
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished branch, or None where there is none that can be read."""
    path = folder / MANIFEST_NAME
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if problem(data) is None else None


def described_files(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file that a sound manifest names, a branch's, a level's or the importance matrix, by name."""
    parts = [data, data.get("imatrix") or {}, *(data.get("levels") or {}).values()]
    return {name: entry for part in parts for name, entry in (part.get("files") or {}).items()}


def is_complete(folder: Path, data: dict[str, Any]) -> bool:
    """Whether all files of the manifest are there in their full size."""
    try:
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in data["files"].items())
    except (OSError, KeyError, TypeError):
        return False
