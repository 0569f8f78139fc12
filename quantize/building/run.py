"""Runs a plan: one streamed calibration pass, every stale variant solved from it, each put into place whole.

The only module that knows the order of things.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantize.building.build import Build, BuildResult, claim
from quantize.dist.layout import Dist, locked
from quantize.dist.resume import Unfinished, find_unfinished
from quantize.errors import BuildError, CalibrationError, DamagedBuild, PlanError, SourceChanged, SourceError
from quantize.files.cache import cache_error, require_cache
from quantize.files.child import without_secrets
from quantize.files.digest import key_of
from quantize.options import BuildOptions
from quantize.planning.engines import require_engines
from quantize.planning.items import PlannedVariant
from quantize.planning.memory import check_limits
from quantize.planning.plan import Plan
from quantize.planning.planner import plan_recipe
from quantize.publishing.card import refresh_cards
from quantize.recipe import LoadedRecipe
from quantize.reporter import Reporter

if TYPE_CHECKING:
    from quantize.building.gguf_levels import Converted
    from quantize.building.resumable_pass import Pass

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def build_recipe(
    loaded: LoadedRecipe, options: BuildOptions | None = None, reporter: Reporter | None = None
) -> BuildResult:
    """Build every selected branch that is not up to date.

    Args:
        loaded: a recipe from :func:`quantize.load_recipe`.
        options: where the result goes and how it is computed; None takes the defaults.
        reporter: hears what happens; None says nothing.

    Raises:
        QuantizeError: one of its kinds; finished branches are untouched then.
    """
    options, reporter = options or BuildOptions(), reporter or Reporter()
    before = dict(reporter.seconds)
    if options.ray is not None and find_spec("ray") is None:
        raise PlanError(f"--ray {options.ray}: Ray is not installed; install it with: pip install 'quantize[ray]'")
    require_cache()
    with locked(options.dist) as held:
        plan = plan_recipe(loaded, options, reporter, weights=True)
        plan.require_own()
        result = BuildResult(plan)
        result.fresh = [item.label for item in plan.everything if item.state == "fresh" and item.label in plan.selected]
        try:
            if plan.gguf and plan.level_work:
                plan.gguf.require()
            require_engines(plan.engine_work)
            if plan.work or plan.level_work:
                with _open(plan, held, options, reporter) as build:
                    plan = result.plan = build.plan
                    _build(build, result)
            refresh_cards(plan, held)
            claim(plan, held, *(item.folder for item in plan.everything))
            _remove_done(plan)
        except OSError as error:
            if unusable := cache_error(error):
                raise unusable from None
            if error.errno in NO_SPACE:
                raise BuildError(
                    f"{options.dist}: no space left while writing ({error.strerror}); free some space and build "
                    "again: what was finished before is kept and not made again"
                ) from None
            raise
    spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in reporter.seconds.items()}
    result.seconds = {stage: seconds for stage, seconds in spent.items() if seconds}
    return result


@contextmanager
def _open(plan: Plan, held: Dist, options: BuildOptions, reporter: Reporter) -> Iterator[Build]:
    from quantize.executors.choose import open_executor
    from quantize.source.accelerator import settled

    # code of the model's repo, where the recipe lets it run, finds no token: everything is fetched by now
    alone = without_secrets() if plan.recipe.model.trust_remote_code else nullcontext()
    with alone, settled(), open_executor(options.ray, reporter) as executor:
        if options.shards is None:
            plan = replace(plan, shards=min(executor.room(options.device), plan.recipe.calibration.samples))
        yield Build(plan, held, executor, reporter, options)


def _build(build: Build, result: BuildResult) -> None:
    plan, converted, passed = build.plan, None, None
    if plan.level_work:
        from quantize.building.gguf_levels import convert_source

        converted = convert_source(build)
    if plan.needs_pass:
        passed = _build_branches(build, result)
    if plan.engine_work:
        _build_by_engines(build, result)
    if converted:
        _build_levels(build, converted, passed, result)


def _build_branches(build: Build, result: BuildResult) -> Pass:
    """Solve the branches that are not fresh and put them into place; returns the pass, which serves the GGUF levels."""
    from quantize.building.resumable_pass import Pass

    one = Pass(build)
    _check_disk(build.plan, build.plan.native_work, one.unfinished)
    check_limits(build.plan.memory)
    try:
        branches = one.run()
        with build.reporter.stage("write"):
            manifests = [one.complete(branch) for branch in branches]
    except BaseException as error:
        _keep_or_remove(build, one.unfinished, error)
        raise
    # every branch is complete before the first reaches its place, so that those left behind are found there
    for branch, data in zip(branches, manifests, strict=True):
        build.publish(branch.item, branch.folder)
        result.add(branch.item.label, data["ledger"])
    return one


def _keep_or_remove(build: Build, unfinished: Unfinished, error: BaseException) -> None:
    """Keep the finished blocks of a pass that failed, unless no later build can use them."""
    state = unfinished.state
    # a damaged source or text will be another one when it is whole, and so another build; one that was changed may
    # be put back
    useless = isinstance(error, SourceError | CalibrationError) and not isinstance(error, SourceChanged)
    if isinstance(error, DamagedBuild):
        return  # it says what to do; and what is damaged is the user's to look at
    if state.next_block and not useless:
        build.reporter.say(
            f"{state.next_block} of {state.blocks} blocks are kept; build again to go on after them, "
            "or free their space with 'quantize clean'"
        )
    else:
        unfinished.remove()


def _build_by_engines(build: Build, result: BuildResult) -> None:
    from quantize.branches.completion import NotOnDisk, complete
    from quantize.building.engine_branches import make_branches

    todo = build.plan.engine_work
    _check_disk(build.plan, [*todo, *todo])  # an engine's result lies beside its rewriting
    for made in make_branches(build):
        with build.reporter.stage("write"):
            try:
                data = complete(build.plan, made)
            except NotOnDisk as error:
                raise BuildError(f"{made.folder}: the disk lost what was written ({error}); build again") from None
        build.publish(made.item, made.folder)
        result.add(made.item.label, data["ledger"])


def _build_levels(build: Build, converted: Converted, passed: Pass | None, result: BuildResult) -> None:
    from quantize.building.gguf_levels import build_levels

    assert build.plan.gguf
    claim(build.plan, build.dist, build.plan.gguf.folder)
    made = build_levels(build, converted, passed.diagonals if passed else None, passed.hessians if passed else None)
    for item in build.plan.level_work:
        result.built.append(item.label)
        odd = {"fallback": list(item.outcome.fallbacks)} if item.outcome and item.outcome.fallbacks else {}
        if unsolved := made.get(item.label):
            odd["no error feedback"] = unsolved
        if odd:
            result.oddities[item.label] = odd


def _remove_done(plan: Plan) -> None:
    """Free what unfinished builds hold whose every branch is in its place."""
    there = {item.label: plan.finished(item).get("key") for item in plan.variants}
    wanted = plan.gguf is not None and plan.gguf.needs_pass
    unsolved = any(
        item.feedback and item.feedback.targets and plan.finished(item).get("key") != key_of(item.key_inputs)
        for item in (plan.gguf.levels if plan.gguf else ())
    )
    for one in find_unfinished(plan.dist):
        needed = (one.state.imatrix and wanted) or (one.state.hessians and unsolved)
        if one.state.branches.items() <= there.items() and not needed:
            one.remove()


def _check_disk(plan: Plan, todo: Sequence[PlannedVariant], unfinished: Unfinished | None = None) -> None:
    carried = sum((plan.source.folder / name).stat().st_size for name in plan.source.carried_over)
    needed = sum(item.nbytes + carried for item in todo)
    if unfinished:
        needed += plan.estimate.kept_bytes - unfinished.nbytes
    free = shutil.disk_usage(plan.dist).free
    if needed > free:
        raise BuildError(
            f"{plan.dist}: the build writes {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space, use another --dist, or build fewer branches with --only"
        )
