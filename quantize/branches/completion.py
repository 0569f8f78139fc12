"""Everything in a branch's folder beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.tokens import Tokens
from quantize.dist.layout import FileEntry, describe_files
from quantize.dist.ledger import LedgerEntry
from quantize.dist.manifest import Manifest, create, manifest
from quantize.files.atomic import write_atomically
from quantize.files.digest import key_of
from quantize.files.versions import versions_of
from quantize.formats.safetensors_digests import begin_checksum, fingerprint
from quantize.planning.items import PlannedVariant
from quantize.planning.left import grouped
from quantize.planning.plan import Plan
from quantize.publishing.card import render_card
from quantize.publishing.config import as_json, loader_config, release_config
from quantize.source.unchanged import copy_unchanged


class NotOnDisk(ValueError):
    """What lies on the disk is not what was written."""


@dataclass(frozen=True)
class Made:
    """A branch's folder with its weights, and nothing else in it yet.

    Attributes:
        compute: how it was computed. checksums: of the tensors that were written, by name.
        engine: of a branch that another engine made: name, version, Python and packages.
    """

    item: PlannedVariant
    folder: Path
    ledger: list[LedgerEntry]
    tokens: Tokens
    compute: Mapping[str, Any]
    checksums: Mapping[str, str]
    engine: dict[str, Any] | None = None


def complete(plan: Plan, made: Made) -> Manifest:
    """Write everything of a branch beside its weights.

    Returns:
        The manifest.

    Raises:
        NotOnDisk: a tensor on the disk is not what was written. SourceChanged: nor is a file of the source.
    """
    source, item, folder, tokens = plan.source, made.item, made.folder, made.tokens
    file, as_file, config = loader_config(plan.recipe, item, plan.table)
    for name in source.carried_over:
        copy_unchanged(source, name, folder / name)
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
        compute=dict(made.compute),
        versions=versions(str(made.compute.get("kernel"))),
        tensor_bytes=item.nbytes,
        files=_described(folder, item, made.checksums),
        ledger=made.ledger,
        rest={"left": grouped(plan.table.left), "share_quantized": round(plan.table.share, 6)},
        engine=made.engine,
    )
    create(folder, data)
    write_atomically(folder / "README.md", render_card(plan, item.method).encode())
    return data


def _described(folder: Path, item: PlannedVariant, checksums: Mapping[str, str]) -> dict[str, FileEntry]:
    """Bytes and SHA-256 of every file of a branch, by name; tensors are compared with ``checksums`` as they are read.

    Raises:
        NotOnDisk: one is not what was written.
    """
    found: dict[str, FileEntry] = {}
    for shard, tensors in item.layout.shards.items():
        path = folder / shard
        try:
            read = fingerprint(path, begin_checksum)
        except ValueError as error:
            raise NotOnDisk(f"{shard}: {error}") from None
        if odd := read.mismatch({name: checksums[name] for name in tensors}):
            raise NotOnDisk(f"{odd} in {shard} is not what was written")
        found[shard] = {"bytes": path.stat().st_size, "sha256": read.sha256}
    return describe_files(folder, found)


def versions(kernel: str) -> dict[str, str]:
    """Of this package and those that its results depend on."""
    packages = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "numba"]
    packages += ["triton"] if kernel == "triton" else []
    return versions_of(packages)
