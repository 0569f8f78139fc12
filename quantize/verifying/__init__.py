"""Verify a release: files match their hashes, tensors match the source, and real consumers load it and agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.dist.layout import dist_of, locked
from quantize.dist.manifest import Manifest, read_manifest, update, with_loads
from quantize.errors import BuildError, QuantizeError
from quantize.linting.files import HubFiles, LocalFiles, RepoFiles, open_target
from quantize.linting.gguf import PART
from quantize.options import VerifyOptions
from quantize.recipe.schema import Model
from quantize.reporter import SILENT, Reporter
from quantize.source.resolve import resolve
from quantize.source.resolved import Source
from quantize.verifying.checks import Check, Verdict
from quantize.verifying.hashes import check_hashes

__all__ = ["Check", "Verdict", "verify"]


def verify(
    target: str,
    options: VerifyOptions | None = None,
    reporter: Reporter = SILENT,
) -> list[Verdict]:
    """Check a folder's or a hub repo's branches.

    Args:
        target: a branch's folder, a folder of branches, ``owner/name`` or ``owner/name@branch``.
        options: what to compare and load. A hub repo that is not downloaded is checked only by the hashes that the hub
            lists.

    Raises:
        SourceError: the target or source does not exist. PushError: the hub refuses, or cannot be reached.
    """
    options = options or VerifyOptions()
    original = resolve(Model(source=options.source), weights=True, reporter=reporter) if options.source else None
    verdicts = []
    for files in open_target(target, options.endpoint):
        reporter.say(f"verifying {files.name}" + (f" {files.branch}" if files.branch else ""))
        local = _downloaded(files, reporter) if options.download and isinstance(files, HubFiles) else files
        strays = _check_strays(local)
        checks = [*strays, check_hashes(local)]
        if strays:
            reporter.say(f"{files.name}: the rest of it is not read")
        elif isinstance(local, LocalFiles):
            checks += _check_local(local, original, options.load)
        else:
            checks.append(Check("tensors", "skipped", "the weights are on the hub; --download fetches and checks them"))
        verdict = Verdict(files.name, files.branch, tuple(checks))
        if isinstance(files, LocalFiles) and options.load:
            _note(files.folder, verdict, reporter)
        verdicts.append(verdict)
    return verdicts


def _downloaded(files: HubFiles, reporter: Reporter) -> LocalFiles:
    reporter.say(f"downloading {files.name} {files.branch} ({sum(files.sizes.values()) / 1e9:.2f} GB)")
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
    """The GGUF models to load (unsplit files or first parts), with all their parts."""
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in files.sizes if _is_level(name)):
        match = PART.match(name)
        first = f"{match['stem']}-{1:05d}-of-{match['parts']}.gguf" if match else name
        found.setdefault(first, []).append(name)
    return found


def _is_level(name: str) -> bool:
    return name.endswith(".gguf") and "imatrix" not in name and not name.startswith("mmproj-")


def _check_strays(files: RepoFiles) -> list[Check]:
    """A failed check if loaders would read something outside the folder, or block at a pipe; otherwise no check."""
    if not files.strays:
        return []
    name, reason = next(iter(files.strays.items()))
    more = f", and {len(files.strays) - 1} more" if len(files.strays) > 1 else ""
    return [Check("files", "failed", f"{name} {reason}{more}; put the files themselves there, or remove it")]


def _note(folder: Path, verdict: Verdict, reporter: Reporter) -> None:
    """Record in the manifest, and so in the card, which consumers loaded the branch.

    Only a branch in a dist is written, under the dist's lock; other folders are not changed.
    """
    data = read_manifest(folder)
    loads: dict[str, Any] = {
        check.name: check.outcome for check in verdict.checks
        if check.name not in {"files", "hashes", "tensors"} and check.outcome != "skipped"
    }  # fmt: skip
    if not loads or data is None or data.get("loads_in") == loads:
        return
    dist = dist_of(folder)
    if dist is None:
        reporter.say(f"{folder}: is not in a dist of `quantize build`, so what loaded it is not recorded")
        return

    def recorded(known: Manifest | None) -> Manifest:
        if known is None:
            raise BuildError(f"{folder}: its manifest can no longer be read")
        return with_loads(known, loads)

    try:
        with locked(dist) as held:
            update(held, folder.resolve(), recorded)
    except QuantizeError as error:  # the checks are valid even if they are not recorded
        reporter.say(f"what loaded it is not recorded in its manifest: {error}")
