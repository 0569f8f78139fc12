"""``quantize clean`` and ``quantize gc``: free what can be computed again."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click

from quantize.cli.options import confirmed, dist_option, gigabytes, json_option, print_json, table
from quantize.cli.reporting import say
from quantize.errors import PlanError

OLD = 30


@click.command()
@dist_option
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def clean(dist: Path, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove unfinished builds from a dist: the saved blocks from which they would resume. Asks first.

    Finished branches and levels are not touched.
    """
    from quantize.dist.layout import WORK_FOLDER, locked
    from quantize.dist.resume import find_unfinished

    folder = Path(dist)
    found = find_unfinished(folder)
    if as_json:
        print_json([one.as_data() for one in found])
    elif found:
        rows = [["unfinished", "blocks", "on disk"]]
        rows += [[one.title, one.progress, gigabytes(one.nbytes)] for one in found]
        click.echo(table(rows, right=frozenset({1, 2})))
    if not found:
        say(f"{dist}: nothing unfinished")
    if dry_run or not (folder / WORK_FOLDER).is_dir():
        return
    agreed = bool(found) and confirmed(f"Remove {len(found)} unfinished?", yes)
    with locked(folder, create=False):  # taking the lock also clears what a killed build left
        shown, freed = {one.folder for one in found}, 0
        for one in find_unfinished(folder) if agreed else ():
            if one.folder in shown:
                freed += one.nbytes
                one.remove()
    if agreed:
        say(f"{gigabytes(freed)} freed")


@click.command()
@click.option(
    "--older-than", "days", type=click.FloatRange(min=0), default=OLD, show_default=True, metavar="DAYS",
    help="Remove entries that have not been used for this many days; 0 removes everything.",
)  # fmt: skip
@click.option("--part", "parts", multiple=True, metavar="PART", help="Only this part, such as statistics.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def gc(days: float, parts: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Free space in the cache: conversions, saved statistics and other data that can be computed again.

    Do not run it with --older-than 0 during a build, which may be using what it removes.
    """
    from quantize.files.cache import cache_folder
    from quantize.files.space import PARTS, entries, free

    for part in parts:
        if part not in PARTS:
            raise PlanError(f"--part {part}: is not a part of the cache; the parts are {', '.join(PARTS)}")
    found = [entry for entry in entries() if not parts or entry.part in parts]
    old = [entry for entry in found if entry.age >= days]
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in found:
        sums[entry.part][0] += entry.nbytes
        sums[entry.part][1] += entry.nbytes if entry in old else 0
    if as_json:
        rows = {part: {"bytes": whole, "removable_bytes": freed} for part, (whole, freed) in sums.items()}
        print_json({"cache": str(cache_folder()), "parts": rows})
    elif found:
        lines = [["part", "", "on disk", "to remove"]]
        lines += [[part, PARTS[part], gigabytes(whole), gigabytes(freed)] for part, (whole, freed) in sums.items()]
        click.echo(table(lines, right=frozenset({2, 3})))
    if not old:
        say(f"{cache_folder()}: nothing is older than {days:g} days")
    elif not dry_run and confirmed(f"Remove {len(old)} entries?", yes):
        for entry in old:
            free(entry)
        say(f"{gigabytes(sum(entry.nbytes for entry in old))} freed")
