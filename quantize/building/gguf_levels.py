"""GGUF levels of a build: one conversion, checked against the source, then levels side by side in child processes."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize import __version__
from quantize.building.build import Build, Diagonals, Hessians
from quantize.building.error_feedback import ErrorFeedback, Made
from quantize.dist.layout import FileEntry
from quantize.dist.manifest import Manifest, Recorded, read_manifest, update, with_level
from quantize.dist.manifest_schema import SCHEMA
from quantize.errors import BuildError, GgufRunError
from quantize.executors.quantizers import Quantizers
from quantize.files.atomic import copy_file, sync_folder
from quantize.files.digest import key_of, sha256_of_file
from quantize.gguf.check import check_conversion
from quantize.gguf.convert import Header
from quantize.gguf.imatrix import Importance, read_importance, write_importance
from quantize.gguf.quantize import failure, request
from quantize.gguf.split import split_file
from quantize.gguf.toolchain import VERSION
from quantize.gguf.vectors import find_vectors
from quantize.planning.items import PlannedLevel
from quantize.planning.levels import LevelPlan
from quantize.publishing.card import licence_files
from quantize.reporter import Advance, Reporter
from quantize.source.unchanged import copy_unchanged


@dataclass(frozen=True)
class Converted:
    """The full-width file of a source, compared with it.

    Attributes:
        path: the file. header: what it is made of. checked: how it compares, for the manifest.
    """

    path: Path
    header: Header
    checked: Mapping[str, Any]


def convert_source(build: Build) -> Converted:
    """Convert the source and compare its logits, before hours of calibration depend on it.

    Raises:
        GgufError: llama.cpp is missing or refuses, or the logits differ.
    """
    reporter, levels = build.reporter, build.plan.gguf
    assert levels is not None
    with reporter.stage("convert"):
        header = levels.conversion.header(reporter)
        for note in levels.notes:
            reporter.say(note)
        path = levels.conversion.make(reporter)
        tolerance = levels.section.logits_tolerance
        checked = check_conversion(levels.conversion, path, tolerance, reporter)
    notes = [*levels.notes, *checked.get("notes", ())]
    return Converted(path, header, {**checked, **({"notes": notes} if notes else {})})


def build_levels(
    build: Build, converted: Converted, diagonals: Diagonals | None, hessians: Hessians | None = None
) -> dict[str, list[str]]:
    """Make every level that is left; each is put into place as soon as it is whole.

    Args:
        diagonals: for the importance matrix, where the pass gathered one. hessians: for error feedback, where it saved
            them.

    Returns:
        By label, tensors that error feedback should have solved but could not.

    Raises:
        GgufError: llama.cpp refuses. BuildError: not enough disk.
    """
    plan, reporter = build.plan, build.reporter
    todo, levels, work = plan.level_work, plan.gguf, build.dist.work
    assert levels is not None
    header, path = converted.header, converted.path
    levels.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(levels, todo)
    manifest = _LevelsManifest(build, levels, converted.checked, diagonals)
    for item in todo:
        if item.is_projector:
            _make_projector(build, levels, item, manifest)
    wanting = any(item.wants_imatrix for item in todo)
    importance = _importance(levels, header, diagonals, manifest, reporter) if wanting else None
    vectors = None
    if importance is not None:
        vectors = work / "imatrix.npz"
        arrays: dict[str, Any] = importance.means()
        np.savez(vectors, **arrays)
    quantizers = build.executor.quantizers([path.parent, work], plan.budget, reporter)
    with reporter.stage("levels"):
        lanes = _Lanes(build, manifest, quantizers, _Inputs(path, vectors, importance))
        lanes.run()
    unsolved: dict[str, list[str]] = {}
    if lanes.to_solve:
        assert hessians is not None
        with reporter.stage("error feedback"):
            rows = ErrorFeedback(build, path, header, hessians, lanes.to_solve).run()
        for made in lanes.to_solve:
            with reporter.stage("write"):
                solved: Recorded = {"solve": "error_feedback", "tensors": rows[made.item.level]}
                lanes.place(made.item, made.path, {**solved, "compute": dict(hessians.compute)})
            assert made.item.feedback
            planned = {target.name for target in made.item.feedback.targets}
            missed = [row for row in rows[made.item.level] if row["outcome"] != "solved" and row["tensor"] in planned]
            unsolved[made.item.label] = [row["tensor"] for row in missed]
    for name in licence_files(plan.source):
        with build.dist.replacing(levels.folder / name) as temporary:
            copy_unchanged(plan.source, name, temporary)
    return unsolved


def _make_projector(build: Build, levels: LevelPlan, item: PlannedLevel, manifest: _LevelsManifest) -> None:
    """The encoder and projector of images or sound: converted, and not quantized."""
    assert levels.projector is not None
    with build.reporter.stage("convert"):
        made = levels.projector.make(build.reporter)
    if made.stat().st_size != item.nbytes:
        raise GgufRunError(f"{item.file}: has {made.stat().st_size:,} bytes, planned were {item.nbytes:,}")
    place = levels.folder / item.file
    with build.dist.replacing(place) as temporary:
        copy_file(made, temporary)
    manifest.note_level(item.level, {
        "key": key_of(item.key_inputs),
        "key_inputs": dict(item.key_inputs),
        "files": {item.file: _described(place)},
    })  # fmt: skip


class _LevelsManifest:
    """The manifest of the GGUF repo, rewritten whenever a file is in its place."""

    def __init__(
        self, build: Build, levels: LevelPlan, checked: Mapping[str, Any], diagonals: Diagonals | None
    ) -> None:
        plan = build.plan
        self.folder, self.shards, self.dist = levels.folder, plan.shards, build.dist
        self.compute = diagonals.compute if diagonals else None
        self.head: Manifest = {
            "schema": SCHEMA,
            "repo": levels.repo,
            "branch": "main",
            "source": {
                "name": plan.source.hub_id or plan.source.short_name,
                "commit": plan.source.commit,
                "made_of": plan.source.origin,
                "files": plan.source.hashes,
            },
            "conversion": {"type": levels.conversion.outtype, **checked},
            "versions": {"quantize": __version__, "llama-cpp-python": VERSION},
        }

    @property
    def data(self) -> Manifest:
        """The manifest as it lies there now, under the heading of this build."""
        return self._of(read_manifest(self.folder))

    def note_imatrix(self, entry: Recorded) -> None:
        update(self.dist, self.folder, lambda known: {**self._of(known), "imatrix": entry})

    def note_level(self, level: str, entry: Recorded) -> None:
        update(self.dist, self.folder, lambda known: with_level(self._of(known), level, entry))

    def _of(self, known: Manifest | None) -> Manifest:
        there = known or {}
        return {**self.head, "imatrix": there.get("imatrix"), "levels": dict(there.get("levels") or {})}


def _importance(
    levels: LevelPlan, header: Header, diagonals: Diagonals | None, manifest: _LevelsManifest, reporter: Reporter
) -> Importance | None:
    """The importance matrix of the pass, of the file the recipe names, or the one that lies in the repo."""
    if levels.imatrix_file is None:
        return None
    place = levels.folder / levels.imatrix_file
    if isinstance(levels.section.imatrix, str):
        given = Path(levels.section.imatrix)
        with manifest.dist.replacing(place) as temporary:
            copy_file(given, temporary)
            if sha256_of_file(temporary) != levels.imatrix_inputs["sha256"]:
                raise GgufRunError(f"{given}: the importance matrix changed while the build was running; build again")
    elif diagonals is not None:
        vectors = find_vectors(diagonals.by_linear, header.made_of, header.shapes())
        if vectors.left_out:
            some = ", ".join(vectors.left_out[:3]) + (", ..." if len(vectors.left_out) > 3 else "")
            reporter.say(f"{len(vectors.left_out)} tensors have no importance, as their inputs are not known: {some}")
        chunks = int(levels.imatrix_inputs["chunks"])
        tokens = max((count for _, count in diagonals.by_linear.values()), default=0)
        importance = Importance(
            {name: sums for name, (sums, _) in vectors.found.items()},
            {name: counts for name, (_, counts) in vectors.found.items()},
            str(levels.imatrix_inputs["dataset"]),
            chunks,
            tokens // max(chunks, 1),
        )
        with manifest.dist.replacing(place) as temporary:
            write_importance(temporary, importance)
    found = read_importance(place)
    known = manifest.data["imatrix"] or {}
    shards = manifest.shards if diagonals is not None else known.get("shards", 1)
    compute = manifest.compute if diagonals is not None else known.get("compute")
    manifest.note_imatrix({
        "key": key_of(levels.imatrix_inputs),
        "key_inputs": dict(levels.imatrix_inputs),
        "entries": len(found.sums),
        **({"shards": shards} if shards > 1 else {}),
        **({"compute": dict(compute)} if compute else {}),
        "files": {place.name: _described(place)},
    })  # fmt: skip
    return found


@dataclass(frozen=True)
class _Inputs:
    """What all levels are made of: the conversion, and the importance matrix with its vectors as a file."""

    conversion: Path
    vectors: Path | None
    importance: Importance | None


class _Lanes:
    """Levels side by side, as many as the quantizers have room for; the first failure ends the others."""

    def __init__(self, build: Build, manifest: _LevelsManifest, quantizers: Quantizers, inputs: _Inputs) -> None:
        assert build.plan.gguf
        self.build, self.manifest, self.quantizers, self.inputs = build, manifest, quantizers, inputs
        self.levels = build.plan.gguf
        self._waiting = [item for item in build.plan.level_work if not item.is_projector]
        self._lanes, self._threads = quantizers.lanes(max(1, len(self._waiting)))
        self._failures: list[Exception] = []
        self.to_solve: list[Made] = []
        self._lock = threading.Lock()
        self._advance: Advance = lambda count: None

    def run(self) -> None:
        """Make all of them, and raise the first failure."""
        count = sum(len(item.outcome.types) for item in self._waiting if item.outcome)
        with self.build.reporter.progress("levels", count, "tensor") as self._advance:
            threads = [threading.Thread(target=self._work) for _ in range(self._lanes)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            except BaseException:  # Ctrl-C: no child may outlive the build
                with self._lock:
                    self._waiting.clear()
                self.quantizers.stop()
                raise
        if self._failures:
            raise self._failures[0]
        self.to_solve.sort(key=lambda made: made.item.level)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._failures or not self._waiting:
                    return
                item = self._waiting.pop(0)
            try:
                self._make(item)
            except Exception as error:
                with self._lock:
                    self._failures.append(error)
                self.quantizers.stop()
                return

    def _heard(self, line: str) -> None:
        if line.startswith("["):  # llama.cpp's line about a tensor
            with self._lock:
                self._advance(1)

    def _make(self, item: PlannedLevel) -> None:
        inputs = self.inputs
        importance = inputs.importance if item.wants_imatrix else None
        temporary = self.build.dist.work / f"{item.file}.part"
        asked = request(
            item.level,
            inputs.conversion,
            temporary,
            threads=self._threads,
            tensor_types=self.levels.section.tensor_types,
            imatrix=inputs.vectors if importance else None,
            metadata=self.levels.metadata(len(importance.sums)) if importance else {},
        )
        try:
            code, log = self.quantizers.run(asked, self._heard)
            if code:
                raise failure(item.level, code, log)
            if item.feedback and item.feedback.targets:
                made = Made(item, temporary)
                with self._lock:
                    self.to_solve.append(made)
                return
            self.place(item, temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def place(self, item: PlannedLevel, temporary: Path, solved: Recorded | None = None) -> None:
        """Check a finished file, split it where it is too large, and put it where it belongs.

        Args:
            solved: for the manifest, where the level was solved with error feedback.
        """
        try:
            self._place(item, temporary, solved or {})
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, item: PlannedLevel, temporary: Path, solved: Recorded) -> None:
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        size, limit = temporary.stat().st_size, self.levels.section.max_file_size
        if item.outcome is not None and size != item.outcome.nbytes:
            raise GgufRunError(f"{item.level}: the file has {size:,} bytes, planned were {item.outcome.nbytes:,}")
        parts = {item.file: temporary}
        if size > limit:
            parts = {part.name: part for part in split_file(temporary, item.file.removesuffix(".gguf"), limit)}
        described = {name: _described(part) for name, part in parts.items()}
        with self._lock:
            _remove_old(self.levels, item, self.manifest, parts)
            for name, part in parts.items():
                os.replace(part, self.levels.folder / name)
            sync_folder(self.levels.folder)
            self.manifest.note_level(item.level, {
                "key": key_of(item.key_inputs),
                "key_inputs": dict(item.key_inputs),
                "files": described,
                "tensor_types": dict(item.outcome.types) if item.outcome else {},
                "fallbacks": list(item.outcome.fallbacks) if item.outcome else [],
                **solved,
            })  # fmt: skip


def _remove_old(levels: LevelPlan, item: PlannedLevel, manifest: _LevelsManifest, parts: Mapping[str, Path]) -> None:
    """Files that the level had before and has no more: other parts, or the whole instead of parts."""
    for name in (manifest.data["levels"].get(item.level) or {}).get("files", {}):
        if name not in parts and Path(name).name == name:
            (levels.folder / name).unlink(missing_ok=True)


def _described(path: Path) -> FileEntry:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _check_disk(levels: LevelPlan, todo: list[PlannedLevel]) -> None:
    needed, free = sum(item.nbytes for item in todo), shutil.disk_usage(levels.folder).free
    if needed > free:
        raise BuildError(
            f"{levels.folder}: the levels take {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space, use another --dist, or build fewer levels with --only"
        )
