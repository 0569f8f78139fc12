"""Is a release what it says: files as hashed, tensors as the source's, loaded by real consumers that answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.dist.manifest import MANIFEST_NAME, read_manifest
from quantize.files.atomic import write_atomically
from quantize.files.notify import Notify
from quantize.linting.files import HubFiles, LocalFiles, RepoFiles, open_target
from quantize.linting.gguf import PART
from quantize.publishing.config import as_json
from quantize.recipe.schema import Model
from quantize.source.resolve import resolve
from quantize.source.resolved import Source
from quantize.verifying.checks import Check, Verdict
from quantize.verifying.hashes import check_hashes

__all__ = ["Check", "Verdict", "verify"]


def verify(
    target: str,
    *,
    source: str | None = None,
    load: bool = True,
    download: bool = False,
    endpoint: str | None = None,
    notify: Notify = lambda line: None,
) -> list[Verdict]:
    """Check a folder's or a hub repo's branches.

    Args:
        target: a branch's folder, a folder of branches, ``owner/name`` or ``owner/name@branch``.
        download: fetch a hub repo's branches, into the hub's own cache, and check them as folders; otherwise the hashes
            that the hub lists are all that is looked at.
        source: the unquantized model, as a recipe's ``model.source``.
        load: load it in the consumers that are installed here.

    Raises:
        SourceError: no such target or source. PushError: the hub refuses, or cannot be reached.
    """
    original = resolve(Model(source=source), weights=True, notify=notify) if source else None
    verdicts = []
    for files in open_target(target, endpoint):
        notify(f"verifying {files.name}" + (f" {files.branch}" if files.branch else ""))
        local = _downloaded(files, notify) if download and isinstance(files, HubFiles) else files
        checks = [check_hashes(local)]
        if isinstance(local, LocalFiles):
            checks += _check_local(local, original, load)
        else:
            checks.append(Check("tensors", "skipped", "the weights are on the hub; --download fetches and checks them"))
        verdict = Verdict(files.name, files.branch, tuple(checks))
        if isinstance(files, LocalFiles) and load:
            _note(files.folder, verdict)
        verdicts.append(verdict)
    return verdicts


def _downloaded(files: HubFiles, notify: Notify) -> LocalFiles:
    notify(f"downloading {files.name} {files.branch} ({sum(files.sizes.values()) / 1e9:.2f} GB)")
    with files.hub.explained(files.name):
        return LocalFiles(Path(files.hub.api.snapshot_download(files.name, revision=files.head)))


def _check_local(files: LocalFiles, source: Source | None, load: bool) -> list[Check]:
    from quantize.verifying.loaders import check_gguf, check_gptq_or_awq
    from quantize.verifying.tensors import check_tensors

    levels = _level_files(files)
    if levels:
        return check_gguf(files.folder, levels, source) if load else []
    checks = [check_tensors(files.folder, source)]
    return checks + (check_gptq_or_awq(files.folder) if load else [])


def _level_files(files: RepoFiles) -> dict[str, list[str]]:
    """The GGUF files that a loader is given (whole ones, first parts), with all their parts; no importance matrix."""
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in files.sizes if name.endswith(".gguf") and "imatrix" not in name):
        match = PART.match(name)
        first = f"{match['stem']}-{1:05d}-of-{match['parts']}.gguf" if match else name
        found.setdefault(first, []).append(name)
    return found


def _note(folder: Path, verdict: Verdict) -> None:
    """Which consumers loaded the branch goes into its manifest, and from there into the card."""
    data = read_manifest(folder)
    if data is None:
        return
    loads: dict[str, Any] = {
        check.name: check.outcome for check in verdict.checks
        if check.name not in {"hashes", "tensors"} and check.outcome != "skipped"
    }  # fmt: skip
    if loads and data.get("loads_in") != loads:
        write_atomically(folder / MANIFEST_NAME, as_json({**data, "loads_in": loads}))
