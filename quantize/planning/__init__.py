"""From a recipe and a model's headers to a plan: branches, exact sizes, keys, what is fresh. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantize.calibration.corpus import title
from quantize.calibration.tokens import calibration_identity
from quantize.engines import Engine
from quantize.errors import PlanError
from quantize.formats.manifest import is_complete, read_manifest
from quantize.planning.estimate import Estimate, estimate
from quantize.planning.foreign import engine_of, identity_of, layout_of, obstacles
from quantize.planning.keys import differences, key_inputs, key_of
from quantize.planning.levels import LevelPlan, PlannedLevel, plan_levels
from quantize.planning.memory import Memory, MemoryModel
from quantize.planning.modules import ModuleTable, find_linears
from quantize.planning.propagation import with_propagation
from quantize.planning.sizes import Layout, check_variant, variant_layout
from quantize.recipe import LoadedRecipe
from quantize.recipe.methods import Gptq, Method, Variant
from quantize.recipe.schema import Recipe, RepoNameError, repo_id
from quantize.source.resolve import resolve
from quantize.source.resolved import Notify, Source

State = Literal["missing", "stale", "fresh"]


@dataclass(frozen=True)
class PlannedVariant:
    """One branch to build.

    Attributes:
        method: the method, whose repo ``repo`` it belongs to.
        variant: its parameters.
        layout: its tensors, shard by shard; ``layout.nbytes`` is exact.
        folder: where it will lie, ``dist/<repo name>/<branch>``.
        state: ``missing``, ``stale`` or ``fresh``; ``why`` says why in one line.
    """

    method: Method
    repo: str
    variant: Variant
    layout: Layout
    folder: Path
    state: State
    why: str

    @property
    def branch(self) -> str:
        assert self.variant.branch
        return self.variant.branch

    @property
    def label(self) -> str:
        """What commands and reports call it: ``gptq/main``. Every method's repo has a ``main``."""
        return f"{self.method}/{self.branch}"

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def format(self) -> str:
        """The checkpoint format that it is published in: ``gptq``, ``awq`` or ``compressed-tensors``."""
        return layout_of(self.variant)

    @property
    def engine(self) -> Engine | None:
        """What makes it; None for our own solvers."""
        return engine_of(self.variant)


@dataclass(frozen=True)
class Plan:
    """What a build of this recipe would do."""

    loaded: LoadedRecipe
    source: Source
    table: ModuleTable
    repos: Mapping[str, str]
    dist: Path
    variants: tuple[PlannedVariant, ...]
    gguf: LevelPlan | None
    selected: frozenset[str]
    budget: int | None = None
    """Bytes of memory that a build of it has to keep to."""
    shards: int = 1
    """Parts that the calibration windows are run in; sums over them depend on it in their last bits."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def work(self) -> list[PlannedVariant]:
        """The selected branches that are not fresh."""
        return [item for item in self.variants if item.state != "fresh" and item.label in self.selected]

    @property
    def native_work(self) -> list[PlannedVariant]:
        """Of the work, what our own solvers make, all from one pass."""
        return [item for item in self.work if not item.engine]

    @property
    def foreign_work(self) -> list[PlannedVariant]:
        """Of the work, what other engines make, each by itself."""
        return [item for item in self.work if item.engine]

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """Branches of the work that their engine cannot make here as things are, by label, and why."""
        return obstacles(self.foreign_work)

    @property
    def everything(self) -> list[PlannedVariant | PlannedLevel]:
        """Branches, then GGUF levels."""
        return [*self.variants, *(self.gguf.levels if self.gguf else ())]

    @property
    def level_work(self) -> list[PlannedLevel]:
        """The selected GGUF levels that are not fresh."""
        levels = self.gguf.levels if self.gguf else ()
        return [item for item in levels if item.state != "fresh" and item.label in self.selected]

    @property
    def gathers_imatrix(self) -> bool:
        """Whether the pass has to gather an importance matrix for the levels that are left."""
        wanting = any(item.wants_imatrix for item in self.level_work)
        return self.gguf is not None and wanting and self.gguf.needs_pass

    def of(self, method: Method) -> list[PlannedVariant]:
        """The branches of one method's repo."""
        return [item for item in self.variants if item.method == method]

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(
            self.source.checkpoint,
            self.table,
            self.recipe.calibration,
            [item.variant for item in self.native_work],
            [(item.level, self.source.checkpoint.nbytes) for item in self.level_work],
            self.gathers_imatrix,
            self.budget,
            self.shards,
        )

    @cached_property
    def memory(self) -> Memory:
        """How a build keeps to the budget.

        Raises:
            PlanError: it cannot.
        """
        variants = [item.variant for item in self.native_work]
        calibration, imatrix = self.recipe.calibration, self.gathers_imatrix
        model = MemoryModel(self.source.checkpoint, self.table, calibration, variants, imatrix, self.shards)
        return model.within(self.budget)

    @cached_property
    def calibration(self) -> dict[str, Any]:
        return calibration_identity(self.recipe.calibration)

    def finished(self, item: PlannedVariant | PlannedLevel) -> dict[str, Any]:
        """What the manifest on disk says of an item; empty where there is none."""
        data = read_manifest(item.folder) or {}
        if isinstance(item, PlannedVariant):
            return data
        entry: dict[str, Any] = (data.get("levels") or {}).get(item.level) or {}
        return entry

    def key_inputs(self, item: PlannedVariant | PlannedLevel) -> dict[str, Any]:
        """What the item's bytes depend on."""
        if isinstance(item, PlannedLevel):
            return dict(item.key_inputs)
        return _key_inputs(self.recipe, self.source, self.calibration, item.method, item.variant)

    def as_data(self) -> dict[str, Any]:
        """The plan for machines."""
        return {
            "repos": dict(self.repos),
            "source": {"named": self.source.named, "commit": self.source.commit},
            "calibration": {
                "dataset": [title(corpus) for corpus in self.recipe.calibration.dataset],
                "samples": self.recipe.calibration.samples,
                "sequence_length": self.recipe.calibration.sequence_length,
            },
            "linears": len(self.table.linears),
            "blocks": self.table.blocks,
            "seconds": round(self.estimate.seconds, 1),
            "peak_bytes": self.estimate.peak_bytes,
            "gpu_bytes": self.estimate.gpu_bytes,
            "memory": dict(self.memory.parts) if self.native_work or self.gathers_imatrix else {},
            "variants": [
                {
                    "method": item.method,
                    "repo": item.repo,
                    "branch": item.branch,
                    **item.variant.model_dump(exclude={"branch"}),
                    "tensor_bytes": item.nbytes,
                    "shards": len(item.layout.shards),
                    "state": item.state,
                    "why": item.why,
                    "selected": item.label in self.selected,
                    **({"obstacle": self.obstacles[item.label]} if item.label in self.obstacles else {}),
                }
                for item in self.variants
            ],
            "levels": [
                {
                    "repo": item.repo,
                    "level": item.level,
                    "file": item.file,
                    "bytes": item.outcome.nbytes if item.outcome else None,
                    "fallbacks": list(item.outcome.fallbacks) if item.outcome else None,
                    "state": item.state,
                    "why": item.why,
                    "selected": item.label in self.selected,
                }
                for item in (self.gguf.levels if self.gguf else ())
            ],
        }


def plan_recipe(
    loaded: LoadedRecipe,
    dist: Path | str = "dist",
    only: Sequence[str] = (),
    *,
    weights: bool = False,
    budget: int | None = None,
    shards: int = 1,
    notify: Notify = lambda line: None,
) -> Plan:
    """Plan a build.

    Args:
        loaded: a recipe from :func:`quantize.load_recipe`.
        dist: where finished branches lie.
        only: patterns of branches, such as ``gptq-4bit*`` or ``awq/*``; none selects all.
        budget: bytes of memory that a build has to keep to; None sets no limit.
        shards: parts that the calibration windows are run in.
        weights: fetch a hub model's weights too (a build), not only its headers (a plan).
        notify: told in one line before anything slow begins.

    Raises:
        SourceError: the model. PlanError: recipe and model do not fit. CalibrationError: no such text.
    """
    recipe = loaded.recipe
    source = resolve(recipe.model, weights=weights, small_files=recipe.gguf is not None, notify=notify)
    table = find_linears(source.checkpoint)
    _check_length(loaded, source)
    if shards > recipe.calibration.samples:
        raise PlanError(
            f"--shards {shards}: there are {recipe.calibration.samples} windows to share out (calibration.samples); "
            f"use at most {recipe.calibration.samples}"
        )
    repos = _repos(loaded, source)
    identity = calibration_identity(recipe.calibration)
    planned = []
    for method in recipe.methods:
        repo, section = repos[method], recipe.section(method)
        for asked, place in zip(recipe.variants(method), loaded.variant_places[method], strict=True):
            variant = with_propagation(asked)
            try:
                check_variant(table, variant)
            except PlanError as error:
                raise loaded.error(place, f"branch {variant.branch}: {error}") from None
            zero_bias = isinstance(section, Gptq) and section.zero_bias
            layout = variant_layout(source.checkpoint, table, variant, recipe.release.max_shard_size, zero_bias)
            folder = Path(dist) / repo.rsplit("/", 1)[-1] / str(variant.branch)
            state, why = _state(folder, lambda m=method, v=variant: _key_inputs(recipe, source, identity, m, v))
            planned.append(PlannedVariant(method, repo, variant, layout, folder, state, why))
    gguf = plan_levels(recipe, source, identity, repos["gguf"], Path(dist), notify) if recipe.gguf else None
    everything: list[PlannedVariant | PlannedLevel] = [*planned, *(gguf.levels if gguf else ())]
    for folder in {item.folder for item in everything}:
        if not folder.resolve().is_relative_to(Path(dist).resolve()):
            raise PlanError(f"{folder}: is a link that leads out of {dist}; put the folder itself there, or remove it")
    selected = _select(everything, only)
    return Plan(loaded, source, table, repos, Path(dist), tuple(planned), gguf, selected, budget, shards)


def _key_inputs(
    recipe: Recipe, source: Source, calibration: dict[str, Any], method: Method, variant: Variant
) -> dict[str, Any]:
    settings = {**calibration, "compute_dtype": recipe.calibration.compute_dtype}
    section, engine = recipe.section(method), identity_of(variant)
    return key_inputs(source.hashes, settings, method, section, variant, recipe.release, engine)


def _state(folder: Path, inputs: Any) -> tuple[State, str]:
    if not folder.exists():
        return "missing", "not built yet"
    manifest = read_manifest(folder)
    if manifest is None:
        return "stale", "has no manifest that can be read"
    if not is_complete(folder, manifest):
        return "stale", "files of it are missing or cut short"
    now = inputs()
    if manifest.get("key") == key_of(now):
        return "fresh", "up to date"
    changed = differences(manifest.get("key_inputs") or {}, now)
    return "stale", "changed: " + (changed[0] if changed else "its key") + (
        f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    )


def _check_length(loaded: LoadedRecipe, source: Source) -> None:
    length = loaded.recipe.calibration.sequence_length
    config = source.checkpoint.text_config
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(limit, int) and length > limit:
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
    """Labels that match a pattern: one with a slash is of method and branch, others are of the branch alone."""

    def matches(item: PlannedVariant | PlannedLevel, pattern: str) -> bool:
        return fnmatchcase(item.label if "/" in pattern else item.branch, pattern)

    for pattern in only:
        if not any(matches(item, pattern) for item in items):
            raise PlanError(
                f"--only '{pattern}' matches no branch; the branches are {', '.join(item.label for item in items)}"
            )
    return frozenset(item.label for item in items if not only or any(matches(item, pattern) for pattern in only))
