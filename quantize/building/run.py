"""Runs a plan: one streamed calibration pass, every stale variant solved from it, each put into place whole.

The only module that knows the order of things.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.dist.layout import Dist, locked, publish
from quantize.dist.ledger import oddities
from quantize.dist.origins import remember_origins
from quantize.dist.resume import Unfinished, find_unfinished
from quantize.errors import BuildError, CalibrationError, DamagedBuild, PlanError, SourceChanged, SourceError
from quantize.files.cache import cache_error, require_cache
from quantize.files.child import without_secrets
from quantize.files.notify import Notify
from quantize.planning.engines import require_engines
from quantize.planning.memory import check_limits
from quantize.planning.ownership import origin_of
from quantize.planning.plan import Plan, PlannedVariant
from quantize.planning.planner import plan_recipe
from quantize.publishing.card import refresh_cards
from quantize.recipe import LoadedRecipe

if TYPE_CHECKING:
    from quantize.executors.api import Workers

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
    budget: int | None = None,
    keep_statistics: bool = False,
    shards: int | None = None,
    ray: str | None = None,
    progress: bool | None = None,
    notify: Notify = lambda line: None,
) -> BuildResult:
    """Build every selected branch that is not up to date.

    Args:
        loaded: a recipe from :func:`quantize.load_recipe`.
        dist: where finished branches go, as ``dist/<repo name>/<branch>``.
        only: branch patterns; none selects all.
        device: ``auto``, ``cpu`` or ``cuda``.
        budget: bytes of memory to keep to; None sets no limit.
        keep_statistics: keep the source's statistics in the cache, so that later variants need no forward pass.
        shards: parts that the calibration windows are run in; None is one, or with ``ray`` as many as have room.
        ray: address of a Ray cluster that does the work; ``auto`` is a running one, or one for this build.
        progress: show a progress bar; None shows it on a terminal only.
        notify: told in one line what happens.

    Raises:
        QuantizeError: one of its kinds; finished branches are untouched then.
    """
    if ray is not None and find_spec("ray") is None:
        raise PlanError(f"--ray {ray}: Ray is not installed; install it with: pip install 'quantize[ray]'")
    require_cache()
    with locked(Path(dist)) as held:
        plan = plan_recipe(loaded, dist, only, weights=True, budget=budget, shards=shards or 1, notify=notify)
        plan.require_own()
        # code of the model's repo, where the recipe lets it run, finds no token: everything is fetched by now
        alone = without_secrets() if loaded.recipe.model.trust_remote_code else nullcontext()
        result = BuildResult(plan)
        result.fresh = [item.label for item in plan.everything if item.state == "fresh" and item.label in plan.selected]
        try:
            if plan.gguf and plan.level_work:
                plan.gguf.require()
            require_engines(plan.foreign_work)
            if plan.work or plan.level_work:
                with alone, _settled(), _workers(ray, notify) as workers:
                    if shards is None:
                        room = workers.room(device)
                        plan = result.plan = replace(plan, shards=min(room, loaded.recipe.calibration.samples))
                    _build(plan, workers, held, device, keep_statistics, progress, notify, result)
            refresh_cards(plan, held)
            _remember(held, plan, *(item.folder for item in plan.everything))
            _remove_done(plan)
        except OSError as error:
            if unusable := cache_error(error):
                raise unusable from None
            if error.errno in NO_SPACE:
                raise BuildError(
                    f"{dist}: no space left while writing ({error.strerror}); free some space and build again: "
                    "what was finished before is kept and not made again"
                ) from None
            raise
    return result


def _remember(held: Dist, plan: Plan, *folders: Path) -> None:
    """The repos of these branches' folders are from now on of the plan's source."""
    remember_origins(held, {folder.parent.name: origin_of(plan.source) for folder in folders})


@contextmanager
def _settled() -> Iterator[None]:
    from quantize.source.accelerator import settled

    with settled():
        yield


@contextmanager
def _workers(ray: str | None, notify: Notify) -> Iterator[Workers]:
    from quantize.executors.choose import open_workers

    with open_workers(ray, notify) as workers:
        yield workers


def _build(
    plan: Plan,
    workers: Workers,
    held: Dist,
    device: str,
    keep_statistics: bool,
    progress: bool | None,
    notify: Notify,
    result: BuildResult,
) -> None:
    diagonals, compute = None, None
    if plan.native_work or plan.gathers_imatrix:
        diagonals, compute = _build_branches(plan, workers, held, device, keep_statistics, progress, notify, result)
    if plan.foreign_work:
        _build_foreign(plan, held, device, notify, result)
    if plan.level_work:
        _build_levels(plan, workers, diagonals, compute, held, progress, notify, result)


def _remove_done(plan: Plan) -> None:
    """Free what unfinished builds hold whose every branch is in its place."""
    there = {item.label: plan.finished(item).get("key") for item in plan.variants}
    wanted = plan.gguf is not None and plan.gguf.needs_pass
    for one in find_unfinished(plan.dist):
        if one.state.branches.items() <= there.items() and not (one.state.imatrix and wanted):
            one.remove()


def _check_disk(plan: Plan, todo: Sequence[PlannedVariant], kept: Unfinished | None = None) -> None:
    carried = sum((plan.source.folder / name).stat().st_size for name in plan.source.carried_over)
    needed = sum(item.nbytes + carried for item in todo)
    if kept:
        needed += plan.estimate.kept_bytes - kept.nbytes
    free = shutil.disk_usage(plan.dist).free
    if needed > free:
        raise BuildError(
            f"{plan.dist}: the build writes {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space, use another --dist, or build fewer branches with --only"
        )


def _build_levels(
    plan: Plan,
    workers: Workers,
    diagonals: Any,
    compute: Mapping[str, Any] | None,
    held: Dist,
    progress: bool | None,
    notify: Notify,
    result: BuildResult,
) -> None:
    from quantize.building.gguf_levels import build_levels

    assert plan.gguf
    _remember(held, plan, plan.gguf.folder)
    result.built += build_levels(
        plan, plan.level_work, diagonals, workers, held, result.timed, progress, notify, compute
    )
    for item in plan.level_work:
        if item.outcome and item.outcome.fallbacks:
            result.oddities[item.label] = {"fallback": list(item.outcome.fallbacks)}


def _build_foreign(plan: Plan, held: Dist, device: str, notify: Notify, result: BuildResult) -> None:
    from quantize.building.completion import NotOnDisk, complete
    from quantize.building.engine_branches import make_branches

    _check_disk(plan, [*plan.foreign_work, *plan.foreign_work])  # an engine's result lies beside its rewriting
    for made in make_branches(plan, plan.foreign_work, held.work, device, result.timed, notify):
        with result.timed("write"):
            about = (made.compute, made.digests, made.engine)
            try:
                data = complete(plan, made.item, made.folder, made.ledger, made.tokens, *about)
            except NotOnDisk as error:
                raise BuildError(f"{made.folder}: the disk lost what was written ({error}); build again") from None
        _put_into_place(made.item, made.folder, data, held, result)


def _put_into_place(
    item: PlannedVariant, folder: Path, manifest: Mapping[str, Any], held: Dist, result: BuildResult
) -> None:
    with result.timed("write"):
        _remember(held, result.plan, item.folder)
        publish(folder, item.folder, held.work)
    result.built.append(item.label)
    if odd := oddities(manifest["ledger"]):
        result.oddities[item.label] = odd


def _build_branches(
    plan: Plan,
    workers: Workers,
    held: Dist,
    device: str,
    keep_statistics: bool,
    progress: bool | None,
    notify: Notify,
    result: BuildResult,
) -> Any:
    """Solve the branches that are not fresh and put them into place.

    Returns:
        Diagonals for an importance matrix, and how they were computed.
    """
    from quantize.building.branches import Pass

    todo = plan.native_work
    one = Pass(plan, todo, plan.gathers_imatrix, device, keep_statistics, result.timed, notify)
    _check_disk(plan, todo, one.kept)
    check_limits(plan.memory)
    try:
        branches = one.run(workers, progress)
        with result.timed("write"):
            manifests = [one.complete(branch) for branch in branches]
    except BaseException as error:
        state = one.kept.state
        # a damaged source or text will be another one when it is whole, and so another build; one that was changed may
        # be put back
        useless = isinstance(error, SourceError | CalibrationError) and not isinstance(error, SourceChanged)
        if isinstance(error, DamagedBuild):
            pass  # it says what to do; and what is damaged is the user's to look at
        elif state.next_block and not useless:
            notify(
                f"{state.next_block} of {state.blocks} blocks are kept; build again to go on after them, "
                "or free their space with 'quantize clean'"
            )
        else:
            one.kept.remove()
        raise
    # every branch is complete before the first reaches its place, so that those left behind are found there
    for branch, data in zip(branches, manifests, strict=True):
        _put_into_place(branch.item, branch.folder, data, held, result)
    return one.diagonals, one.compute
