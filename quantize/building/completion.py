"""Everything in a branch's folder beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.calibration.tokens import Tokens
from quantize.dist.layout import describe_files
from quantize.dist.ledger import LedgerEntry
from quantize.dist.manifest import create, manifest
from quantize.files.atomic import copy_file, write_atomically
from quantize.files.digest import key_of
from quantize.files.versions import versions_of
from quantize.planning.plan import Plan, PlannedVariant
from quantize.publishing.card import render_card
from quantize.publishing.config import as_json, loader_config, release_config


def complete(
    plan: Plan,
    item: PlannedVariant,
    folder: Path,
    ledger: list[LedgerEntry],
    tokens: Tokens,
    compute: dict[str, Any],
    engine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write configs, the source's files, the manifest and the card beside a branch's weights.

    Args:
        compute: how it was computed. engine: of a foreign branch: name, version, Python and packages.

    Returns:
        The manifest.
    """
    source = plan.source
    file, as_file, config = loader_config(plan.recipe, item, plan.table)
    for name in source.carried_over:
        copy_file(source.folder / name, folder / name)
    if file:
        write_atomically(folder / file, as_json(as_file))
    write_atomically(folder / "config.json", as_json(release_config(source.checkpoint.config, config)))
    inputs = plan.key_inputs(item)
    data = manifest(
        branch=item.branch,
        repo=item.repo,
        key=key_of(inputs),
        key_inputs=inputs,
        source={
            "name": source.hub_id or source.short_name,
            "commit": source.commit,
            "made_of": source.origin,
            "files": source.hashes,
        },
        calibration={
            **plan.calibration,
            "tokens_sha256": tokens.sha256,
            "tokens": int(tokens.ids.size),
            "bos": tokens.bos,
        },
        compute=compute,
        versions=versions(str(compute.get("kernel"))),
        tensor_bytes=item.nbytes,
        files=describe_files(folder),
        ledger=ledger,
        engine=engine,
    )
    create(folder, data)
    write_atomically(folder / "README.md", render_card(plan, item.method).encode())
    return data


def versions(kernel: str) -> dict[str, str]:
    """Of this package and those that its results depend on."""
    packages = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "numba"]
    packages += ["triton"] if kernel == "triton" else []
    return versions_of(packages)
