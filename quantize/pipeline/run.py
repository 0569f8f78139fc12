"""Runs a plan: one streamed calibration pass, every stale variant solved from it, each put into place whole.

The only module that knows the order of things.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize import __version__
from quantize.errors import BuildError
from quantize.formats.manifest import MANIFEST_NAME, LedgerEntry, manifest, oddities
from quantize.planning import Plan, PlannedVariant, plan_recipe
from quantize.planning.foreign import require_engines
from quantize.planning.keys import key_of
from quantize.recipe import LoadedRecipe
from quantize.release.card import refresh_cards, render_card
from quantize.release.config import as_json, loader_config, release_config
from quantize.release.tree import copy_file, describe_files, locked, publish
from quantize.source.cache import cache_folder, write_atomically
from quantize.source.resolved import Notify

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class BuildResult:
    """What a build did.

    Attributes:
        plan: the plan it ran. built, fresh: labels such as ``gptq/main``. seconds: by stage.
        oddities: for each built branch's label, modules by what happened to them.
    """

    plan: Plan
    built: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    oddities: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    _inner: float = field(default=0.0, repr=False)  # seconds of the stages timed inside the present one

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Book the time spent inside to ``stage``, without that of stages timed inside it."""
        start = time.perf_counter()
        inner, self._inner = self._inner, 0.0
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + whole - self._inner
            self._inner = inner + whole


def build_recipe(
    loaded: LoadedRecipe,
    dist: Path | str = "dist",
    only: Sequence[str] = (),
    *,
    device: str = "auto",
    progress: bool | None = None,
    notify: Notify = lambda line: None,
) -> BuildResult:
    """Build every selected branch that is not up to date.

    Args:
        loaded: a recipe from :func:`quantize.load_recipe`.
        dist: where finished branches go, as ``dist/<repo name>/<branch>``.
        only: branch patterns; none selects all.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show a progress bar; None shows it on a terminal only.
        notify: told in one line what happens.

    Raises:
        QuantizeError: one of its kinds; finished branches are untouched then.
    """
    with locked(Path(dist)) as work:
        plan = plan_recipe(loaded, dist, only, weights=True, notify=notify)
        result = BuildResult(plan)
        todo = plan.native_work
        result.fresh = [item.label for item in plan.everything if item.state == "fresh" and item.label in plan.selected]
        try:
            if plan.gguf and plan.level_work:
                plan.gguf.require()
            require_engines(plan.foreign_work)
            diagonals: dict[str, tuple[Any, int]] | None = {} if plan.gathers_imatrix else None
            if todo or diagonals is not None:
                _check_disk(plan, plan.work)
                _build(plan, todo, diagonals, work, device, progress, notify, result)
            if plan.foreign_work:
                _build_foreign(plan, work, device, notify, result)
            if plan.level_work:
                _build_levels(plan, diagonals, work, progress, notify, result)
            refresh_cards(plan)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise BuildError(
                    f"{dist}: no space left while writing ({error.strerror}); nothing unfinished was kept, "
                    "free some space and build again"
                ) from None
            raise
    return result


def _check_disk(plan: Plan, todo: Sequence[PlannedVariant]) -> None:
    carried = sum((plan.source.folder / name).stat().st_size for name in plan.source.carried_over)
    needed = sum(item.nbytes + carried for item in todo)
    free = shutil.disk_usage(plan.dist).free
    if needed > free:
        raise BuildError(
            f"{plan.dist}: the build writes {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space, use another --dist, or build fewer branches with --only"
        )


def _build_levels(
    plan: Plan, diagonals: Any, work: Path, progress: bool | None, notify: Notify, result: BuildResult
) -> None:
    from quantize.pipeline.gguf_levels import build_levels

    result.built += build_levels(plan, plan.level_work, diagonals, work, result.timed, progress, notify)
    for item in plan.level_work:
        if item.outcome and item.outcome.fallbacks:
            result.oddities[item.label] = {"fallback": list(item.outcome.fallbacks)}


def _build_foreign(plan: Plan, work: Path, device: str, notify: Notify, result: BuildResult) -> None:
    from quantize.pipeline.foreign import make_branches

    _check_disk(plan, [*plan.foreign_work, *plan.foreign_work])  # an engine's result lies beside its rewriting
    for made in make_branches(plan, plan.foreign_work, work, device, result.timed, notify):
        with result.timed("write"):
            data = _complete(plan, made.item, made.folder, made.ledger, made.tokens, made.compute, made.engine)
            publish(made.folder, made.item.folder, work)
        result.built.append(made.item.label)
        if odd := oddities(data["ledger"]):
            result.oddities[made.item.label] = odd


def _build(
    plan: Plan,
    todo: Sequence[PlannedVariant],
    diagonals: dict[str, tuple[Any, int]] | None,
    work: Path,
    device: str,
    progress: bool | None,
    notify: Notify,
    result: BuildResult,
) -> None:
    from quantize.calibration.forward import choose_device, choose_dtype
    from quantize.calibration.tokens import load_tokenizer, sample_tokens
    from quantize.pipeline.branch import Branch
    from quantize.pipeline.calibration_pass import CalibrationPass
    from quantize.pipeline.memory import return_large_buffers
    from quantize.source.streamed import StreamedModel

    # compiled kernels belong into our cache, not beside the source, which may be read-only
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))
    recipe, source = plan.recipe, plan.source
    return_large_buffers()
    where = choose_device(device)
    shapes = [(linear.out_features, linear.in_features) for linear in plan.table.linears]
    dtype = choose_dtype(recipe.calibration.compute_dtype, where, shapes)
    with result.timed("tokens"):
        tokens = sample_tokens(recipe.calibration, load_tokenizer(source, recipe.model.trust_remote_code))
    with result.timed("load"):
        model = StreamedModel(source, plan.table.prefix, dtype, where, recipe.model.trust_remote_code)
    compute = {"device": where.type, "dtype": str(dtype).removeprefix("torch.")}
    notify(
        f"calibrating once on {tokens.ids.size} tokens for {_what(todo, diagonals is not None)} "
        f"({compute['device']}, {compute['dtype']})"
    )
    with ExitStack() as stack:
        branches = [
            stack.enter_context(
                Branch(item, work / "building" / item.label, fail_on=tuple(recipe.section(item.method).fail_on))
            )
            for item in todo
        ]
        CalibrationPass(plan, model, tokens, branches, diagonals, result.timed, progress).run()
        with result.timed("write"):
            for branch in branches:
                branch.writer.finish()
    for branch in branches:
        with result.timed("write"):
            data = _complete(plan, branch.item, branch.folder, branch.ledger, tokens, compute)
            publish(branch.folder, branch.item.folder, work)
        result.built.append(branch.item.label)
        if odd := oddities(data["ledger"]):
            result.oddities[branch.item.label] = odd


def _what(todo: Sequence[PlannedVariant], imatrix: bool) -> str:
    parts = [f"{len(todo)} branch{'es' if len(todo) != 1 else ''}"] if todo else []
    return " and ".join([*parts, *(["an importance matrix"] if imatrix else [])])


def _complete(
    plan: Plan,
    item: PlannedVariant,
    folder: Path,
    ledger: list[LedgerEntry],
    tokens: Any,
    compute: dict[str, str],
    engine: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything in a branch's folder beside its weights: configs, the source's files, manifest, card."""
    source = plan.source
    file, as_file, config = loader_config(plan.recipe, item)
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
        versions=_versions(),
        tensor_bytes=item.nbytes,
        files=describe_files(folder),
        ledger=ledger,
        engine=engine,
    )
    write_atomically(folder / MANIFEST_NAME, as_json(data))
    write_atomically(folder / "README.md", render_card(plan, item.method).encode())
    return data


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "numba")
    return {
        "quantize": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
