"""Branches that other engines make: each in a process of its own, its result rewritten into a branch of ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantize.branches.completion import Made
from quantize.branches.engine_tensors import rewrite
from quantize.building.build import Build
from quantize.calibration.tokens import load_tokenizer, sample_tokens
from quantize.engines.process import run_worker
from quantize.errors import EngineError, EngineRunError
from quantize.files.atomic import write_atomically
from quantize.files.cache import cache_folder
from quantize.files.digest import key_of
from quantize.planning.engines import environment_of
from quantize.publishing.config import as_json, in_all_words
from quantize.source.resolved import Source
from quantize.source.unchanged import check_small_files, check_weights


def make_branches(build: Build) -> Iterator[Made]:
    """Make one branch after the other.

    Raises:
        EngineError: an engine failed, or what it made is no branch of this model; its log is kept in the cache.
    """
    plan, work, reporter = build.plan, build.dist.work, build.reporter
    with reporter.stage("tokens"):
        tokenizer = load_tokenizer(plan.source, plan.recipe.model.trust_remote_code)
        tokens = sample_tokens(plan.recipe.calibration, tokenizer)
    place = (work / "engines").resolve()  # the engine works elsewhere
    place.mkdir()
    ids = place / "ids.npy"
    np.save(ids, tokens.ids)
    source = _readable_source(plan.source, place / "source")
    for number, item in enumerate(plan.engine_work):
        engine = item.engine
        assert engine
        environment = environment_of(engine)
        raw = place / f"raw{number}"
        raw.mkdir()
        log = cache_folder() / "engines" / "logs" / f"{item.method}-{key_of(plan.key_inputs(item))[:16]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "action": "run", "method": item.method, "source": str(source), "ids": str(ids), "out": str(raw),
            "parameters": item.variant.model_dump(exclude={"branch", "engine"}), "device": build.options.device,
            "trust_remote_code": plan.recipe.model.trust_remote_code,
        }  # fmt: skip
        reporter.say(f"{item.label}: {engine.title} is at work, alone; its log is {log}")
        try:
            with reporter.stage(engine.name), log.open("w", encoding="utf-8") as file:
                answer = run_worker(engine, environment.python, request, file)
            cost = f"{answer['seconds']:.0f} s and {answer['peak_bytes'] / 1e9:.2f} GB of memory"
            reporter.say(f"{item.label}: {engine.name} took {cost}")
            folder = work / "building" / item.label
            with reporter.stage("write"):
                ledger, checksums = rewrite(plan, item, raw, folder, answer["said"].get("modules", []))
                shutil.rmtree(raw)
                check_small_files(plan.source)  # the engine read the source by itself
                check_weights(plan.source)
        except EngineError as error:
            raise EngineRunError(f"{item.label}: {error}") from None
        compute = {name: str(answer["said"][name]) for name in ("device", "dtype")}
        about = {**environment.identity, "python": answer["python"], "packages": answer["packages"]}
        yield Made(item, folder, ledger, tokens, compute, checksums, about)


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
