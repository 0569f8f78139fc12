"""Plan the build of a recipe from its model's headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from quantize.calibration.tokens import calibration_identity
from quantize.dist.layout import place_problem
from quantize.dist.manifest import is_complete, read_manifest
from quantize.errors import PlanError
from quantize.files.digest import key_of
from quantize.options import PlanOptions, Selection
from quantize.planning.items import PlannedLevel, PlannedVariant, State
from quantize.planning.keys import differences
from quantize.planning.left import unread_experts
from quantize.planning.levels import plan_levels
from quantize.planning.modules import ModuleTable, find_linears
from quantize.planning.ownership import other_owner
from quantize.planning.plan import Plan, variant_key_inputs
from quantize.planning.propagation import with_propagation
from quantize.planning.sizes import check_variant, variant_layout
from quantize.recipe import LoadedRecipe
from quantize.recipe.methods import Gptq
from quantize.recipe.schema import RepoNameError, repo_id
from quantize.reporter import SILENT, Reporter
from quantize.source.anatomy import Anatomy
from quantize.source.checkpoint import with_slices
from quantize.source.examination import anatomy_of
from quantize.source.resolve import resolve
from quantize.source.resolved import Source

Item = TypeVar("Item", PlannedVariant, PlannedLevel)


def plan_recipe(
    loaded: LoadedRecipe,
    options: Selection | None = None,
    reporter: Reporter = SILENT,
    *,
    weights: bool = False,
) -> Plan:
    """Plan a build.

    Args:
        loaded: a recipe from :func:`quantize.load_recipe`.
        options: the folder of finished branches, the selection, and in :class:`PlanOptions` how a build would run.
        weights: fetch a hub model's weights too (to build), not only its headers (to plan).
        reporter: gets one line before any slow step.

    Raises:
        SourceError: the model cannot be read. PlanError: recipe and model do not fit together.
        CalibrationError: a calibration text cannot be read.
    """
    recipe, options = loaded.recipe, options or PlanOptions()
    dist = options.dist
    asked = options if isinstance(options, PlanOptions) else PlanOptions()
    shards = asked.shards or 1
    trust = recipe.model.trust_remote_code
    source = resolve(recipe.model, weights=weights, small_files=trust or recipe.gguf is not None, reporter=reporter)
    anatomy = anatomy_of(source, trust_remote_code=trust, here=weights, reporter=reporter)
    source = replace(source, checkpoint=with_slices(source.checkpoint, anatomy.slices))
    table = _table(loaded, source, anatomy)
    _check_length(loaded, source)
    if shards > recipe.calibration.samples:
        raise PlanError(
            f"--shards {shards}: there are only {recipe.calibration.samples} windows (calibration.samples); "
            f"use at most {recipe.calibration.samples}"
        )
    repos = _repos(loaded, source)
    identity = calibration_identity(recipe.calibration)
    planned = []
    for method in recipe.methods:
        repo, section = repos[method], recipe.section(method)
        for wanted, place in zip(recipe.variants(method), loaded.variant_places[method], strict=True):
            variant = with_propagation(wanted)
            try:
                check_variant(table, variant)
            except PlanError as error:
                raise loaded.error(place, f"branch {variant.branch}: {error}") from None
            zero_bias = isinstance(section, Gptq) and section.zero_bias
            layout = variant_layout(source.checkpoint, table, variant, recipe.release.max_shard_size, zero_bias)
            folder = dist / repo.rsplit("/", 1)[-1] / str(variant.branch)
            state, why = _state(folder, lambda m=method, v=variant: variant_key_inputs(recipe, source, identity, m, v))
            planned.append(PlannedVariant(method, repo, variant, layout, folder, state, why))
    gguf = (
        plan_levels(recipe, source, identity, repos["gguf"], dist=dist, table=table, reporter=reporter)
        if recipe.gguf
        else None
    )
    everything: list[PlannedVariant | PlannedLevel] = [*planned, *(gguf.levels if gguf else ())]
    for folder in {item.folder for item in everything}:
        if (problem := place_problem(dist, folder)) is not None:
            raise PlanError(f"{folder}: {problem}")
    selected = _select(everything, options.only)
    plan = Plan(loaded, source, table, repos, dist, tuple(planned), gguf, selected, asked.memory, shards)
    return _with_owners(plan)


def _table(loaded: LoadedRecipe, source: Source, anatomy: Anatomy) -> ModuleTable:
    asked = loaded.recipe.quantize
    try:
        table = find_linears(source.checkpoint, anatomy, asked)
    except PlanError as error:
        key, found, _ = str(error).partition(": ")
        raise (loaded.error(("quantize",), str(error)) if found and key.startswith("quantize.") else error) from None
    if loaded.recipe.methods and (why := unread_experts(source.checkpoint, asked)) is not None:
        raise PlanError(
            f"architecture '{source.checkpoint.model_type}': no loader is known to read its experts in GPTQ or AWQ "
            f"({why}); its GGUF builds (leave out the gptq: and awq: sections); to build them all the same, set "
            "`quantize.unread_experts: true` in the recipe"
        )
    if loaded.recipe.methods and table.share < asked.min_share:
        most = max(table.left, key=lambda one: one.parameters if one.block is not None else 0)
        raise PlanError(
            f"architecture '{source.checkpoint.model_type}': only {table.share:.1%} of the blocks' weights can be "
            f"quantized, the most of the rest is such as {most.name} ({most.reason}); to release it all the same, set "
            "`quantize.min_share` in the recipe"
        )
    return table


def _with_owners(plan: Plan) -> Plan:
    """The plan with items marked as taken if their folder contains another model's release."""
    owners = {folder: other_owner(folder, plan.source) for folder in {item.folder.parent for item in plan.everything}}
    taken = {folder: f"contains a release of another model, {owner}" for folder, owner in owners.items() if owner}
    if not taken:
        return plan

    def marked(item: Item) -> Item:
        why = taken.get(item.folder.parent)
        return item if why is None else replace(item, state="taken", why=why)

    levels = plan.gguf and replace(plan.gguf, levels=tuple(marked(level) for level in plan.gguf.levels))
    return replace(plan, variants=tuple(marked(item) for item in plan.variants), gguf=levels)


def _state(folder: Path, inputs: Any) -> tuple[State, str]:
    if not folder.exists():
        return "missing", "not built yet"
    manifest = read_manifest(folder)
    if manifest is None:
        return "stale", "has no readable manifest"
    if not is_complete(folder, manifest):
        return "stale", "some of its files are missing or truncated"
    now = inputs()
    if manifest.get("key") == key_of(now):
        return "fresh", "up to date"
    changed = differences(manifest.get("key_inputs") or {}, now)
    return "stale", "changed: " + (changed[0] if changed else "its key") + (
        f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    )


def _check_length(loaded: LoadedRecipe, source: Source) -> None:
    length = loaded.recipe.calibration.sequence_length
    limit = source.checkpoint.size("max_position_embeddings", "n_positions")
    if limit is not None and length > limit:
        raise loaded.error(
            ("calibration", "sequence_length"),
            f"{length} is more than the {limit} positions of this model; use at most {limit}",
        )


def _repos(loaded: LoadedRecipe, source: Source) -> dict[str, str]:
    release = loaded.recipe.release
    methods = [*loaded.recipe.methods, *(["gguf"] if loaded.recipe.gguf else [])]
    try:
        return {method: repo_id(release.repo, release.owner, source.short_name, method) for method in methods}
    except RepoNameError as error:
        raise loaded.error(("release", "repo"), str(error)) from None


def _select(items: Sequence[PlannedVariant | PlannedLevel], only: Sequence[str]) -> frozenset[str]:
    """Labels that match a pattern: with a slash it is matched against method/branch, otherwise against the branch."""

    def matches(item: PlannedVariant | PlannedLevel, pattern: str) -> bool:
        return fnmatchcase(item.label if "/" in pattern else item.branch, pattern)

    for pattern in only:
        if not any(matches(item, pattern) for item in items):
            raise PlanError(
                f"--only '{pattern}' matches no branch; the branches are {', '.join(item.label for item in items)}"
            )
    return frozenset(item.label for item in items if not only or any(matches(item, pattern) for pattern in only))
