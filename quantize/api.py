"""The Python API: everything that the command line can do, under the same names.

Each function takes the recipe, or what it works on, then one frozen options object whose fields are the command's
flags, then a :class:`Reporter` that hears what happens. None of them prints or asks. Errors are kinds of
:class:`quantize.errors.QuantizeError`, whose text is one sentence for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.options import (
    BuildOptions,
    MeasureOptions,
    PlanOptions,
    PruneOptions,
    PushOptions,
    RebuildOptions,
    Selection,
    VerifyOptions,
)
from quantize.recipe import LoadedRecipe, load_recipe
from quantize.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from quantize.building import BuildResult
    from quantize.hub.client import Hub
    from quantize.linting import Report
    from quantize.measuring import Measured
    from quantize.planning.plan import Plan
    from quantize.publishing.compare import BranchChange
    from quantize.publishing.git import WrittenBranch
    from quantize.publishing.prune import Orphan
    from quantize.rebuilding.rebuild import Compared
    from quantize.verifying import Verdict

__all__ = [
    "BuildOptions",
    "MeasureOptions",
    "PlanOptions",
    "PruneOptions",
    "PushOptions",
    "RebuildOptions",
    "Reporter",
    "Selection",
    "VerifyOptions",
    "build",
    "diff",
    "export_git",
    "lint",
    "load_recipe",
    "measure",
    "orphans",
    "plan",
    "prune",
    "push",
    "rebuild",
    "render_cards",
    "report",
    "verify",
]


def plan(recipe: LoadedRecipe, options: Selection | None = None, reporter: Reporter = SILENT) -> Plan:
    """What a build would do: every branch with its exact size, and what it costs. Reads headers, no weights.

    Raises:
        SourceError: the model. PlanError: recipe and model do not fit. CalibrationError: no such text.
    """
    from quantize.planning.planner import plan_recipe

    return plan_recipe(recipe, options, reporter)


def build(recipe: LoadedRecipe, options: BuildOptions | None = None, reporter: Reporter | None = None) -> BuildResult:
    """Build every selected branch and level that is not up to date, from one calibration pass. Measures nothing.

    Raises:
        QualityError: what was built and measured before is out of the recipe's bounds; all else is built then.
        QuantizeError: another of its kinds; finished branches are untouched then.
    """
    from quantize.building import build_recipe
    from quantize.publishing.bounds import require_within_bounds

    result = build_recipe(recipe, options, reporter)
    require_within_bounds(result.plan)
    return result


def measure(recipe: LoadedRecipe, options: MeasureOptions | None = None, reporter: Reporter = SILENT) -> Measured:
    """Perplexity and KL divergence of what is built, noted in the manifests and cards.

    Raises:
        CalibrationError: the text is the calibration text, or cannot be read. ReleaseError: nothing is built.
        QualityError: a variant is out of the recipe's bounds; all figures are noted then.
    """
    from quantize.measuring import measure_recipe

    found = measure_recipe(recipe, options, reporter)
    found.require_within_bounds()
    return found


def rebuild(target: Path | str, options: RebuildOptions | None = None, reporter: Reporter = SILENT) -> list[Compared]:
    """Build again what the manifests at ``target`` say, and compare every file's hash.

    Raises:
        ManifestError: the manifests are not of one release, or lack something. QuantizeError: as a build.
    """
    from quantize.rebuilding.rebuild import rebuild as repeat

    return repeat(Path(target), options, reporter)


def verify(target: Path | str, options: VerifyOptions | None = None, reporter: Reporter = SILENT) -> list[Verdict]:
    """Check hashes and tensors of branches, and load them in the consumers that are installed here.

    Args:
        target: a branch's folder, a folder of branches, ``owner/name`` or ``owner/name@branch``.

    Raises:
        SourceError: no such target or source. PushError: the hub refuses, or cannot be reached.
    """
    from quantize.verifying import verify as check

    return check(str(target), options, reporter)


def lint(
    target: Path | str, *, source: str | None = None, endpoint: str | None = None, reporter: Reporter = SILENT
) -> list[Report]:
    """Check anybody's quantized repo, in a folder or on the hub, for what loaders would stumble over.

    Raises:
        SourceError: no such folder, repo or branch. PushError: the hub refuses, or cannot be reached.
    """
    from quantize.linting import lint as check

    return check(str(target), source=source, endpoint=endpoint, reporter=reporter)


def render_cards(recipe: LoadedRecipe, options: Selection | None = None, reporter: Reporter = SILENT) -> list[Path]:
    """Render the model cards of finished branches again; returns those that were written.

    Raises:
        ReleaseError: nothing is built.
    """
    from quantize.dist.layout import locked
    from quantize.publishing.card import refresh_cards
    from quantize.publishing.finished import check_dist

    found = plan(recipe, options, reporter)
    check_dist(found, reporter)
    with locked(found.dist, create=False) as held:
        return list(refresh_cards(found, held))


def report(
    recipe: LoadedRecipe, out: Path | str, options: Selection | None = None, reporter: Reporter = SILENT
) -> Path:
    """Write the measured quality as one HTML page that needs nothing else."""
    from quantize.files.atomic import write_atomically
    from quantize.publishing.report import render_report

    write_atomically(Path(out), render_report(plan(recipe, options, reporter)).encode())
    return Path(out)


def diff(
    recipe: LoadedRecipe,
    options: Selection | None = None,
    push_options: PushOptions | None = None,
    reporter: Reporter = SILENT,
) -> list[BranchChange]:
    """How the hub differs from what is finished; changes nothing.

    Raises:
        ReleaseError: a selected branch is not built. PushError: the hub refuses, or cannot be reached.
    """
    from quantize.publishing.push import Pusher

    return Pusher(plan(recipe, options, reporter), push_options, reporter).changes()


def push(
    recipe: LoadedRecipe,
    options: Selection | None = None,
    push_options: PushOptions | None = None,
    reporter: Reporter = SILENT,
) -> list[BranchChange]:
    """Bring the hub to what is finished: one commit a branch, ``main`` last; returns what was changed.

    Raises:
        ReleaseError: a selected branch is not built, not what was built, or out of bounds.
        PushError: refused; what was pushed before stays whole.
    """
    from quantize.publishing.push import Pusher

    return Pusher(plan(recipe, options, reporter), push_options, reporter).push()


def export_git(
    recipe: LoadedRecipe,
    out: Path | str,
    options: Selection | None = None,
    reporter: Reporter = SILENT,
    *,
    force: bool = False,
) -> list[WrittenBranch]:
    """Write the finished branches as bare git repos with LFS; with ``force`` also what is out of the recipe's bounds.

    Raises:
        ReleaseError: a branch is not finished, or cannot be written there.
    """
    from quantize.publishing.git import write_repos

    return write_repos(plan(recipe, options, reporter), Path(out), reporter, force=force)


def orphans(recipe: LoadedRecipe, options: PruneOptions | None = None, reporter: Reporter = SILENT) -> list[Orphan]:
    """Branches, levels and files that earlier builds or pushes left behind and the recipe no longer names.

    Raises:
        PlanError: dist contains another model's release. PushError: the hub refuses, or cannot be reached.
    """
    return _orphans(recipe, options or PruneOptions(), reporter)[0]


def prune(
    recipe: LoadedRecipe,
    options: PruneOptions | None = None,
    reporter: Reporter = SILENT,
    *,
    agreed: Callable[[Sequence[Orphan]], bool] | None = None,
) -> list[Orphan]:
    """Remove what :func:`orphans` finds, for good; returns what was removed.

    Args:
        agreed: is shown what would be removed, once, even if that is nothing; unless it returns True, nothing is.

    Raises:
        ReleaseError, PushError: something was changed in the meantime, or the hub refuses. As :func:`orphans`.
    """
    from quantize.publishing.prune import remove

    found, planned, hub = _orphans(recipe, options or PruneOptions(), reporter)
    if (agreed is not None and not agreed(found)) or not found:
        return []
    remove(planned, found, hub)
    return found


def _orphans(recipe: LoadedRecipe, options: PruneOptions, reporter: Reporter) -> tuple[list[Orphan], Plan, Hub | None]:
    from quantize.hub.client import Hub
    from quantize.publishing.prune import orphans_in_dist, orphans_on_hub

    planned = plan(recipe, Selection(dist=options.dist), reporter)
    hub = Hub(options.endpoint, reporter) if options.where != "dist" else None
    found = orphans_in_dist(planned) if options.where != "hub" else []
    found += orphans_on_hub(planned, hub) if hub else []
    return [orphan for orphan in found if not orphan.matches(options.keep)], planned, hub
