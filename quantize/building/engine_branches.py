"""Branches that other engines make: each in a process of its own, its result rewritten into a branch of ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize.building.engine_tensors import rewrite
from quantize.calibration.statistics import Timed
from quantize.calibration.tokens import Tokens, load_tokenizer, sample_tokens
from quantize.dist.ledger import LedgerEntry
from quantize.engines.process import run_worker
from quantize.errors import EngineError, EngineRunError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder
from quantize.files.digest import key_of
from quantize.files.notify import Notify
from quantize.planning.engines import environment_of
from quantize.planning.plan import Plan, PlannedVariant
from quantize.publishing.config import as_json, in_all_words
from quantize.source.resolved import Source
from quantize.source.unchanged import check_small_files, check_weights


@dataclass(frozen=True)
class Made:
    """A branch's folder with its weights, and nothing else in it yet.

    Attributes:
        digests: of its tensors, by name. engine: for the manifest: name, version, Python and packages.
    """

    item: PlannedVariant
    folder: Path
    ledger: list[LedgerEntry]
    tokens: Tokens
    compute: dict[str, str]
    digests: Mapping[str, str]
    engine: dict[str, Any]


def make_branches(
    plan: Plan, todo: Sequence[PlannedVariant], work: Path, device: str, timed: Timed, notify: Notify
) -> Iterator[Made]:
    """Make one branch after the other.

    Args:
        work: a folder for everything unfinished. device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        EngineError: an engine failed, or what it made is no branch of this model; its log is kept in the cache.
    """
    with timed("tokens"):
        tokenizer = load_tokenizer(plan.source, plan.recipe.model.trust_remote_code)
        tokens = sample_tokens(plan.recipe.calibration, tokenizer)
    place = (work / "engines").resolve()  # the engine works elsewhere
    place.mkdir()
    ids = place / "ids.npy"
    np.save(ids, tokens.ids)
    source = _readable_source(plan.source, place / "source")
    for number, item in enumerate(todo):
        engine = item.engine
        assert engine
        environment = environment_of(engine)
        raw = place / f"raw{number}"
        raw.mkdir()
        log = cache_folder() / "engines" / "logs" / f"{item.method}-{key_of(plan.key_inputs(item))[:16]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "action": "run", "method": item.method, "source": str(source), "ids": str(ids), "out": str(raw),
            "parameters": item.variant.model_dump(exclude={"branch", "engine"}), "device": device,
            "trust_remote_code": plan.recipe.model.trust_remote_code,
        }  # fmt: skip
        notify(f"{item.label}: {engine.title} is at work, alone; its log is {log}")
        try:
            with timed(engine.name), log.open("w", encoding="utf-8") as file:
                answer = run_worker(engine, environment.python, request, file)
            cost = f"{answer['seconds']:.0f} s and {answer['peak_bytes'] / 1e9:.2f} GB of memory"
            notify(f"{item.label}: {engine.name} took {cost}")
            folder = work / "building" / item.label
            with timed("write"):
                ledger, digests = rewrite(plan, item, raw, folder, answer["said"].get("modules", []))
                shutil.rmtree(raw)
                check_small_files(plan.source)  # the engine read the source by itself
                check_weights(plan.source)
        except EngineError as error:
            raise EngineRunError(f"{item.label}: {error}") from None
        compute = {name: str(answer["said"][name]) for name in ("device", "dtype")}
        about = {**environment.identity, "python": answer["python"], "packages": answer["packages"]}
        yield Made(item, folder, ledger, tokens, compute, digests, about)


def _readable_source(source: Source, folder: Path) -> Path:
    """The source's files by links, its config in the words of transformers 4 and 5."""
    folder.mkdir()
    for name in source.hashes:
        if name != "config.json":
            link = folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((source.folder / name).resolve())
    write_atomically(folder / "config.json", as_json(in_all_words(source.checkpoint.config)))
    return folder
