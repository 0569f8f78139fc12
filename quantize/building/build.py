"""What the parts of a build share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.dist.layout import Dist, publish
from quantize.dist.ledger import oddities
from quantize.dist.origins import remember_origins
from quantize.dist.resume import Unfinished
from quantize.options import BuildOptions
from quantize.planning.items import PlannedVariant
from quantize.planning.ownership import origin_of
from quantize.planning.plan import Plan
from quantize.reporter import Reporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantize.executors.api import Executor


def claim(plan: Plan, dist: Dist, *folders: Path) -> None:
    """Note that the repos of these branches' folders now belong to the plan's source."""
    remember_origins(dist, {folder.parent.name: origin_of(plan.source) for folder in folders})


@dataclass(frozen=True)
class Build:
    """A build that runs.

    Attributes:
        plan: what it makes. dist: the locked folder that it writes into. executor: who gathers statistics and solves.
        reporter: hears what happens, and keeps the time of each stage. options: how it was asked to run.
    """

    plan: Plan
    dist: Dist
    executor: Executor
    reporter: Reporter
    options: BuildOptions

    def publish(self, item: PlannedVariant, folder: Path) -> None:
        """Put a finished branch into its place."""
        with self.reporter.stage("write"):
            claim(self.plan, self.dist, item.folder)
            publish(folder, item.folder, self.dist.work)


@dataclass(frozen=True)
class Diagonals:
    """What a pass gives GGUF's importance matrix.

    Attributes:
        by_linear: for each linear of the checkpoint the diagonal of X^T X, float32 [K], and tokens.
        compute: how they were computed, for the manifest.
    """

    by_linear: Mapping[str, tuple[NDArray[np.float32], int]]
    compute: Mapping[str, Any]


@dataclass(frozen=True)
class Hessians:
    """What a pass saved for error feedback on GGUF levels.

    Attributes:
        saved: the unfinished build in whose folder they lie. compute: how they were computed, for the manifest.
    """

    saved: Unfinished
    compute: Mapping[str, Any]


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

    def add(self, label: str, ledger: list[dict[str, Any]]) -> None:
        """Note a branch that is in its place now."""
        self.built.append(label)
        if odd := oddities(ledger):
            self.oddities[label] = odd
