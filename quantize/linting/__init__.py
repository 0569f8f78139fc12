"""Check anybody's quantized repo as a careful publisher would. Changes nothing, and runs no code from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from quantize.dist.manifest import MANIFEST_NAME, Manifest, described_files
from quantize.dist.manifest_schema import problem
from quantize.errors import QuantizeError, printable
from quantize.linting.card import base_model, check_card, check_inherited, check_tokenizer
from quantize.linting.configs import check_configs, method_of
from quantize.linting.files import RepoFiles, open_target
from quantize.linting.findings import SEVERITIES, Finding, capped, error, note
from quantize.linting.gguf import check_gguf
from quantize.linting.tensors import check_weights
from quantize.reporter import SILENT, Reporter

LONGEST_KIND = 80


@dataclass(frozen=True)
class Report:
    """The findings in one branch.

    Attributes:
        kind: ``gguf``, a quantization method, or ``unquantized``.
    """

    name: str
    branch: str | None
    kind: str
    findings: tuple[Finding, ...]

    def as_data(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "name": self.name,
            "branch": self.branch,
            "kind": self.kind,
            "findings": [finding.as_data() for finding in self.findings],
        }


def lint(
    target: str, *, source: str | None = None, endpoint: str | None = None, reporter: Reporter = SILENT
) -> list[Report]:
    """Check a folder's or a hub repo's branches.

    Args:
        target: a branch's folder, a folder of branches, ``owner/name`` or ``owner/name@branch``.
        source: the unquantized model, a folder or a hub id; by default the one named in the card of a hub repo.
        endpoint: address of the hub.

    Raises:
        SourceError: the folder, repo or branch does not exist. PushError: the hub refuses, or cannot be reached.
    """
    reports = []
    origins: dict[str, RepoFiles] = {}
    for files in open_target(target, endpoint):
        reporter.say(f"checking {files.name}" + (f" {files.branch}" if files.branch else ""))
        named = source or (None if files.is_local else base_model(files))
        findings: list[Finding] = []
        if named and named not in origins:
            try:
                origins[named] = open_target(named, endpoint, local=named == source)[0]
            except QuantizeError as problem:
                if source:
                    raise
                findings.append(note("source", "README.md:base_model", f"could not be compared: {problem}"))
        kind = _kind(files)
        findings += _check(files, kind)
        if named in origins:
            findings += check_inherited(files, origins[named], kind)
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        reports.append(Report(files.name, files.branch, kind, tuple(findings)))
    return reports


def _kind(files: RepoFiles) -> str:
    if any(name.endswith(".gguf") for name in files.sizes) and not files.headers:
        return "gguf"
    return printable(method_of(files) or "unquantized")[:LONGEST_KIND]


def _check(files: RepoFiles, kind: str) -> Iterator[Finding]:
    yield from capped(
        error("stray", name, f"{reason}; put the file itself there") for name, reason in files.strays.items()
    )
    if kind == "gguf":
        yield from check_gguf(files)
    else:
        yield from check_configs(files)
        yield from check_weights(files, kind)
        yield from check_tokenizer(files)
    yield from check_card(files, kind)
    yield from _check_manifest(files)


def _check_manifest(files: RepoFiles) -> Iterator[Finding]:
    """Compare sizes with our manifest, if there is one."""
    if MANIFEST_NAME not in files.sizes:
        return
    data = files.json(MANIFEST_NAME)
    if data is None or (wrong := problem(data)) is not None:
        yield error("manifest", MANIFEST_NAME, f"is not a valid manifest ({wrong if data else 'not a JSON object'})")
        return
    yield from capped(_sizes_of(files, data))


def _sizes_of(files: RepoFiles, data: dict[str, Any]) -> Iterator[Finding]:
    for name, entry in described_files(cast("Manifest", data)).items():
        wanted, real = entry["bytes"], files.sizes.get(name)
        if real is None:
            yield error("manifest", name, f"is listed in {MANIFEST_NAME}, but missing")
        elif real != wanted:
            yield error("manifest", name, f"has {real:,} bytes, {MANIFEST_NAME} says {wanted:,}")
