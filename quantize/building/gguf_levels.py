"""GGUF levels of a build: one conversion, checked against the source, then levels side by side in child processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from quantize import __version__
from quantize.calibration.statistics import Timed
from quantize.dist.layout import Dist
from quantize.dist.manifest import Manifest, read_manifest, update, with_level
from quantize.dist.manifest_schema import SCHEMA
from quantize.errors import BuildError, GgufRunError
from quantize.executors.api import Workers
from quantize.executors.quantizers import Quantizers
from quantize.files.atomic import copy_file, sync_folder
from quantize.files.digest import key_of, sha256_of_file
from quantize.files.notify import Notify
from quantize.gguf.check import check_conversion
from quantize.gguf.imatrix import Importance, read_importance, write_importance
from quantize.gguf.quantize import failure, request
from quantize.gguf.split import split_file
from quantize.gguf.stacks import targets_of
from quantize.gguf.toolchain import VERSION
from quantize.planning.levels import LevelPlan, PlannedLevel
from quantize.planning.plan import Plan
from quantize.publishing.card import licence_files
from quantize.source.unchanged import copy_unchanged

Diagonals = Mapping[str, tuple[NDArray[np.float32], int]]
"""For each linear of the checkpoint: diagonal of X^T X, float32 [K], and tokens."""


def build_levels(
    plan: Plan,
    todo: list[PlannedLevel],
    diagonals: Diagonals | None,
    workers: Workers,
    held: Dist,
    timed: Timed,
    progress: bool | None,
    notify: Notify,
    compute: Mapping[str, Any] | None = None,
) -> list[str]:
    """Make every file of ``todo``; each is put into place as soon as it is whole.

    Args:
        held: the dist that they are built in.
        compute: how ``diagonals`` were computed.

    Returns:
        The labels of what was built.

    Raises:
        GgufError: llama.cpp is missing or refuses. BuildError: not enough disk.
    """
    levels, work = plan.gguf, held.work
    assert levels is not None
    levels.folder.mkdir(parents=True, exist_ok=True)
    with timed("convert"):
        header = levels.conversion.header(notify)
        path = levels.conversion.make(notify)
        checked = check_conversion(levels.conversion, plan.table.prefix, path, levels.section.logits_tolerance, notify)
    _check_disk(levels, todo)
    notebook = _Notebook(plan, levels, checked, held, compute)
    wanting = any(item.wants_imatrix for item in todo)
    importance = _importance(levels, header, diagonals, notebook) if wanting else None
    vectors = None
    if importance is not None:
        vectors = work / "imatrix.npz"
        arrays: dict[str, Any] = importance.means()
        np.savez(vectors, **arrays)
    quantizers = workers.quantizers([path.parent, work], plan.budget, notify)
    with timed("levels"):
        _run_all(levels, todo, path, vectors, importance, work, notebook, quantizers, progress)
    for name in licence_files(plan.source):
        with held.replacing(levels.folder / name) as temporary:
            copy_unchanged(plan.source, name, temporary)
    return [item.label for item in todo]


class _Notebook:
    """The manifest of the GGUF repo, rewritten whenever a file is in its place."""

    def __init__(
        self, plan: Plan, levels: LevelPlan, checked: Mapping[str, Any], held: Dist, compute: Mapping[str, Any] | None
    ) -> None:
        self.folder, self.shards, self.held, self.compute = levels.folder, plan.shards, held, compute
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

    def note_imatrix(self, entry: Mapping[str, Any]) -> None:
        update(self.held, self.folder, lambda known: {**self._of(known), "imatrix": dict(entry)})

    def note_level(self, level: str, entry: Mapping[str, Any]) -> None:
        update(self.held, self.folder, lambda known: with_level(self._of(known), level, entry))

    def _of(self, known: Manifest | None) -> Manifest:
        there = known or {}
        return {**self.head, "imatrix": there.get("imatrix"), "levels": dict(there.get("levels") or {})}


def _importance(levels: LevelPlan, header: Any, diagonals: Diagonals | None, notebook: _Notebook) -> Importance | None:
    """The importance matrix of the pass, of the file the recipe names, or the one that lies in the repo."""
    if levels.imatrix_file is None:
        return None
    place = levels.folder / levels.imatrix_file
    if isinstance(levels.section.imatrix, str):
        given = Path(levels.section.imatrix)
        with notebook.held.replacing(place) as temporary:
            copy_file(given, temporary)
            if sha256_of_file(temporary) != levels.imatrix_inputs["sha256"]:
                raise GgufRunError(f"{given}: the importance matrix changed while the build was running; build again")
    elif diagonals is not None:
        entries = targets_of(diagonals, header.became)
        chunks = int(levels.imatrix_inputs["chunks"])
        tokens = max((count for _, count in diagonals.values()), default=0)
        importance = Importance(
            {new: np.stack([diagonals[name][0] for name in old]) for new, old in entries.items()},
            {new: np.array([diagonals[name][1] for name in old]) for new, old in entries.items()},
            str(levels.imatrix_inputs["dataset"]),
            chunks,
            tokens // max(chunks, 1),
        )
        with notebook.held.replacing(place) as temporary:
            write_importance(temporary, importance)
    found = read_importance(place)
    known = notebook.data["imatrix"] or {}
    shards = notebook.shards if diagonals is not None else known.get("shards", 1)
    compute = notebook.compute if diagonals is not None else known.get("compute")
    notebook.note_imatrix({
        "key": key_of(levels.imatrix_inputs),
        "key_inputs": dict(levels.imatrix_inputs),
        "entries": len(found.sums),
        **({"shards": shards} if shards > 1 else {}),
        **({"compute": dict(compute)} if compute else {}),
        "files": {place.name: _described(place)},
    })  # fmt: skip
    return found


def _run_all(
    levels: LevelPlan,
    todo: list[PlannedLevel],
    source: Path,
    vectors: Path | None,
    importance: Importance | None,
    work: Path,
    notebook: _Notebook,
    quantizers: Quantizers,
    progress: bool | None,
) -> None:
    """Levels side by side, as many as the quantizers bear; the first failure ends the others."""
    lanes, threads = quantizers.lanes(len(todo))
    waiting = list(todo)
    running: list[threading.Thread] = []
    failures: list[Exception] = []
    lock = threading.Lock()
    count = sum(len(item.outcome.types) for item in todo if item.outcome)
    with tqdm(total=count, desc="levels", unit="tensor", disable=None if progress is None else not progress) as bar:

        def lane() -> None:
            while True:
                with lock:
                    if failures or not waiting:
                        return
                    item = waiting.pop(0)
                try:
                    _run_one(levels, item, source, vectors, importance, work, notebook, quantizers, threads, lock, bar)
                except Exception as error:
                    with lock:
                        failures.append(error)
                    quantizers.stop()
                    return

        for _ in range(lanes):
            thread = threading.Thread(target=lane)
            thread.start()
            running.append(thread)
        try:
            for thread in running:
                thread.join()
        except BaseException:  # Ctrl-C: no child may outlive the build
            with lock:
                waiting.clear()
            quantizers.stop()
            raise
    if failures:
        raise failures[0]


def _run_one(
    levels: LevelPlan,
    item: PlannedLevel,
    source: Path,
    vectors: Path | None,
    importance: Importance | None,
    work: Path,
    notebook: _Notebook,
    quantizers: Quantizers,
    threads: int,
    lock: threading.Lock,
    bar: Any,
) -> None:
    with_imatrix = importance is not None and item.wants_imatrix
    temporary = work / f"{item.file}.part"
    wish = request(
        item.level,
        source,
        temporary,
        threads=threads,
        tensor_types=levels.section.tensor_types,
        imatrix=vectors if with_imatrix else None,
        metadata=levels.metadata(len(importance.sums)) if with_imatrix and importance else {},
    )
    try:
        code, log = quantizers.run(wish, lambda line: bar.update() if line.startswith("[") else None)
        if code:
            raise failure(item.level, code, log)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if item.outcome is not None and temporary.stat().st_size != item.outcome.nbytes:
            raise GgufRunError(
                f"{item.level}: the file has {temporary.stat().st_size:,} bytes, planned were {item.outcome.nbytes:,}"
            )
        parts = {item.file: temporary}
        if temporary.stat().st_size > levels.section.max_file_size:
            made = split_file(temporary, item.file.removesuffix(".gguf"), levels.section.max_file_size)
            parts = {part.name: part for part in made}
        described = {name: _described(part) for name, part in parts.items()}
        with lock:
            _remove_old(levels, item, notebook, parts)
            for name, part in parts.items():
                os.replace(part, levels.folder / name)
            sync_folder(levels.folder)
            notebook.note_level(item.level, {
                "key": key_of(item.key_inputs),
                "key_inputs": dict(item.key_inputs),
                "files": described,
                "tensor_types": dict(item.outcome.types) if item.outcome else {},
                "fallbacks": list(item.outcome.fallbacks) if item.outcome else [],
            })  # fmt: skip
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _remove_old(levels: LevelPlan, item: PlannedLevel, notebook: _Notebook, parts: Mapping[str, Path]) -> None:
    """Files that the level had before and has no more: other parts, or the whole instead of parts."""
    for name in (notebook.data["levels"].get(item.level) or {}).get("files", {}):
        if name not in parts and Path(name).name == name:
            (levels.folder / name).unlink(missing_ok=True)


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _check_disk(levels: LevelPlan, todo: list[PlannedLevel]) -> None:
    needed, free = sum(item.nbytes for item in todo), shutil.disk_usage(levels.folder).free
    if needed > free:
        raise BuildError(
            f"{levels.folder}: the levels take {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space, use another --dist, or build fewer levels with --only"
        )
