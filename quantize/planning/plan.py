"""A plan: what a build of a recipe would do. Plain data; it never reads weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.calibration.corpus import title
from quantize.calibration.tokens import calibration_identity
from quantize.dist.manifest import Recorded, read_manifest
from quantize.errors import PlanError
from quantize.planning.circumstances import circumstances_here, circumstances_of, made_otherwise
from quantize.planning.engines import identity_of, obstacles
from quantize.planning.estimate import Estimate, estimate
from quantize.planning.items import Item, PlannedLevel, PlannedVariant
from quantize.planning.keys import key_inputs
from quantize.planning.left import grouped
from quantize.planning.levels import LevelPlan
from quantize.planning.memory import Memory, MemoryModel
from quantize.planning.modules import ModuleTable
from quantize.planning.ownership import described
from quantize.recipe import LoadedRecipe
from quantize.recipe.methods import Method, Variant
from quantize.recipe.schema import Recipe
from quantize.source.resolved import Source


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
    """Memory limit of the build in bytes."""
    shards: int = 1
    """Number of parts of the calibration windows; it affects the last bits of sums over them."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def work(self) -> list[PlannedVariant]:
        """The selected branches that are not fresh."""
        return [item for item in self.variants if item.state != "fresh" and item.label in self.selected]

    @property
    def native_work(self) -> list[PlannedVariant]:
        """The part of the work that our own solvers make, in one pass."""
        return [item for item in self.work if not item.engine]

    @property
    def engine_work(self) -> list[PlannedVariant]:
        """The part of the work that external engines make, branch by branch."""
        return [item for item in self.work if item.engine]

    @cached_property
    def obstacles(self) -> dict[str, str]:
        """The reason for each branch of the work whose engine cannot run here at present, by label."""
        return obstacles(self.engine_work)

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
        """Whether the pass has to collect an importance matrix for levels that are not fresh."""
        wanting = any(item.wants_imatrix for item in self.level_work)
        return self.gguf is not None and wanting and self.gguf.needs_pass

    @property
    def feedback_work(self) -> list[PlannedLevel]:
        """The GGUF levels of the work that are solved with error feedback."""
        return [item for item in self.level_work if item.feedback and item.feedback.targets]

    @cached_property
    def hessians(self) -> frozenset[str]:
        """The linears whose inputs' Hessians the pass saves for error feedback."""
        if self.gguf is None or not self.feedback_work:
            return frozenset()
        # of all levels, so that a build resumes from the same ones when some levels are done
        return frozenset[str]().union(*(item.feedback.linears for item in self.gguf.levels if item.feedback))

    @property
    def needs_pass(self) -> bool:
        """Whether anything is left to do that needs the calibration pass."""
        return bool(self.native_work or self.gathers_imatrix or self.hessians)

    def of(self, method: Method) -> list[PlannedVariant]:
        """The branches of one method's repo."""
        return [item for item in self.variants if item.method == method]

    def require_own(self) -> None:
        """Raise :class:`PlanError` if a repo's folder in dist contains a release of another model of the same name."""
        for item in self.everything:
            if item.state == "taken":
                raise PlanError(
                    f"{item.folder.parent}: {item.why}, and this recipe's model is {described(self.source)}; give it "
                    "other repos (release.repo), build it with another --dist, or remove that folder if you no longer "
                    "need it"
                )

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(
            self.source.checkpoint,
            self.table,
            self.recipe.calibration,
            [item.variant for item in self.native_work],
            levels=[(item.level, self.source.checkpoint.nbytes) for item in self.level_work],
            imatrix=self.gathers_imatrix,
            feedback=[item.feedback for item in self.feedback_work if item.feedback],
            budget=self.budget,
            shards=self.shards,
        )

    @cached_property
    def memory(self) -> Memory:
        """Memory settings of a build within the budget.

        Raises:
            PlanError: the budget is too small.
        """
        variants = [item.variant for item in self.native_work]
        calibration, feedback = self.recipe.calibration, bool(self.hessians)
        shared = self.gathers_imatrix or feedback
        model = MemoryModel(self.source.checkpoint, self.table, calibration, variants, shared, self.shards, feedback)
        return model.within(self.budget)

    @cached_property
    def calibration(self) -> dict[str, Any]:
        return calibration_identity(self.recipe.calibration)

    def finished(self, item: Item) -> Recorded:
        """An item's manifest on disk; empty if there is none, or it is another model's."""
        if item.state == "taken":
            return {}
        return item.recorded(read_manifest(item.folder) or {})

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """What a build here would record as ``compute`` and ``versions``."""
        asked = self.recipe.calibration
        return circumstances_here(asked.compute_dtype, asked.batch_tokens, self.shards)

    def made_otherwise(self, item: PlannedVariant | PlannedLevel) -> list[str]:
        """Differences, not in the key, between how a finished item was computed and how a build here would do it."""
        manifest = read_manifest(item.folder) or {}
        data: Recorded = manifest
        if isinstance(item, PlannedLevel):
            own = item.recorded(manifest)
            data = own if own.get("compute") else (manifest.get("imatrix") or {}) if item.wants_imatrix else {}
        elif item.engine:  # its key includes its packages
            return []
        then = circumstances_of(data.get("compute") or {}, data.get("versions") or {})
        return made_otherwise(then, self.circumstances)

    def key_inputs(self, item: PlannedVariant | PlannedLevel) -> dict[str, Any]:
        """What the item's bytes depend on."""
        if isinstance(item, PlannedLevel):
            return dict(item.key_inputs)
        return variant_key_inputs(self.recipe, self.source, self.calibration, item.method, item.variant)

    def as_data(self) -> dict[str, Any]:
        """The plan as JSON data."""
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
            "share_quantized": round(self.table.share, 4),
            "left": grouped(self.table.left),
            "seconds": round(self.estimate.seconds, 1),
            "peak_bytes": self.estimate.peak_bytes,
            "gpu_bytes": self.estimate.gpu_bytes,
            "memory": dict(self.memory.parts) if self.needs_pass else {},
            "scratch_bytes": self.estimate.kept_bytes,
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
                    "made_otherwise": self.made_otherwise(item),
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
                    "error_feedback": {one.name: one.kind for one in item.feedback.targets} if item.feedback else None,
                    "not_solved": dict(item.feedback.left) if item.feedback else None,
                    "state": item.state,
                    "why": item.why,
                    "made_otherwise": self.made_otherwise(item),
                    "selected": item.label in self.selected,
                }
                for item in (self.gguf.levels if self.gguf else ())
            ],
            "level_notes": list(self.gguf.notes) if self.gguf else [],
        }


def variant_key_inputs(
    recipe: Recipe, source: Source, calibration: dict[str, Any], method: Method, variant: Variant
) -> dict[str, Any]:
    asked = recipe.calibration
    settings = {**calibration, "compute_dtype": asked.compute_dtype, "batch_tokens": asked.batch_tokens}
    section, engine = recipe.section(method), identity_of(variant)
    inputs = key_inputs(
        source.hashes, settings, method, section, variant=variant, release=recipe.release, engine=engine
    )
    chosen = {name: list(patterns) for name in ("skip", "only") if (patterns := getattr(recipe.quantize, name))}
    return {**inputs, **({"quantize": chosen} if chosen else {})}
