"""Split a plan's work into jobs for a CI matrix; branches that share a calibration stay in as few jobs as possible."""

from __future__ import annotations

from typing import Any

from quantize.planning.plan import Plan


def job_matrix(plan: Plan, jobs: int = 1) -> dict[str, Any]:
    """``{"include": [{"name": ..., "only": "gptq/main awq/main ..."}, ...]}`` of everything that is not fresh.

    The work is spread by size over at most ``jobs`` jobs, each of which calibrates once. GGUF levels stay in one job,
    because they share a conversion, an importance matrix and their repo's manifest.
    """
    units = [([item.label], item.nbytes) for item in plan.work]
    if plan.level_work:
        units.append(([item.label for item in plan.level_work], sum(item.nbytes for item in plan.level_work)))
    groups: list[tuple[list[str], int]] = [([], 0) for _ in range(min(jobs, len(units)))]
    for labels, nbytes in sorted(units, key=lambda unit: -unit[1]):
        place = min(range(len(groups)), key=lambda index: groups[index][1])
        names, total = groups[place]
        groups[place] = [*names, *labels], total + nbytes
    jobs_of = [{"name": f"job-{number}", "only": " ".join(names)} for number, (names, _) in enumerate(groups, 1)]
    return {"include": jobs_of}
