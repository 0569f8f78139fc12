"""``prune`` takes away what the recipe names no more and nothing else; ``status --hub`` says what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hub_server
import pytest
from conftest import Command
from hub_server import HubServer

import quantize

NAME = "tiny-llama-GPTQ"
REPO = f"local/{NAME}"


@pytest.fixture
def smaller(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The recipe without its second branch."""
    path = tmp_path / "smaller.yaml"
    path.write_text("".join(line for line in tiny_recipe.read_text().splitlines(True) if "eight" not in line))
    return path


def published(run: Command, dist: Path) -> dict[str, str]:
    report = json.loads(run("status", dist, "--json").stdout)["branches"]
    return {row["branch"]: row["published"] for row in report}


def test_status_says_what_is_published(hub: HubServer, run: Command, both: Path) -> None:
    assert published(run, both) == {"gptq/main": "no", "gptq/eight": "no"}
    assert run("push", both, "--only", "eight").returncode == 0
    assert published(run, both) == {"gptq/main": "no", "gptq/eight": "yes"}
    assert run("push", both).returncode == 0
    (both / NAME / "main" / "README.md").write_text("# changed\n")
    shutil.rmtree(both / NAME / "eight")
    assert published(run, both) == {"gptq/main": "differs", "gptq/eight": "only there"}
    assert "published" in run("status", both).stdout


def test_orphans_go_from_dist_and_hub_and_others_stay(hub: HubServer, run: Command, both: Path, smaller: Path) -> None:
    assert run("push", both).returncode == 0
    theirs = hub.repos[REPO]
    theirs.branches["experiment"] = theirs.commit("experiment", {"notes.txt": b"somebody's own branch"})
    (both / NAME / "notes").mkdir()
    before = (dict(theirs.branches), sorted((both / NAME).iterdir()))
    listed = run("prune", both, "--dry-run", "--json", recipe=smaller)
    assert [(row["where"], row["branch"]) for row in json.loads(listed.stdout)] == [("dist", "eight"), ("hub", "eight")]
    refused = run("prune", both, recipe=smaller)  # nobody is there to be asked
    assert (refused.returncode, "add --yes" in refused.stderr) == (2, True)
    assert (theirs.branches, sorted((both / NAME).iterdir())) == before
    done = run("prune", both, "--yes", recipe=smaller, alone=True)
    assert done.returncode == 0, done.stderr
    assert set(theirs.branches) == {"main", "experiment"}
    assert sorted(path.name for path in (both / NAME).iterdir()) == ["main", "notes"]
    assert run("prune", both, recipe=smaller).stdout == "nothing to prune\n"


def test_each_place_alone(hub: HubServer, run: Command, both: Path, smaller: Path) -> None:
    assert run("push", both).returncode == 0
    assert run("prune", both, "--where", "dist", "--yes", recipe=smaller).returncode == 0
    assert "eight" in hub.repos[REPO].branches
    assert not (both / NAME / "eight").exists()
    assert run("prune", both, "--where", "hub", "--yes", recipe=smaller).returncode == 0
    assert "eight" not in hub.repos[REPO].branches


def test_a_branch_that_somebody_moved_meanwhile_stays(hub: HubServer, run: Command, both: Path, smaller: Path) -> None:
    assert run("push", both).returncode == 0
    hub.faults.append(("/tree/", hub_server.move(REPO, "eight")))
    result = run("prune", both, "--where", "hub", "--yes", recipe=smaller)
    assert (result.returncode, "somebody moved the branch meanwhile" in result.stderr) == (1, True)
    assert "theirs.txt" in hub.repos[REPO].tree("eight")


def test_python_shows_what_would_go_and_removes_it_only_if_told(both: Path, smaller: Path) -> None:
    recipe = quantize.load_recipe(smaller)
    options = quantize.PruneOptions(dist=both, where="dist")
    (found,) = quantize.orphans(recipe, options)
    assert (found.where, found.branch) == ("dist", "eight")
    assert quantize.orphans(recipe, options.model_copy(update={"keep": ("eig*",)})) == []
    shown: list[object] = []
    assert quantize.prune(recipe, options, agreed=lambda orphans: shown.extend(orphans)) == []
    assert (shown, (both / NAME / "eight").is_dir()) == ([found], True)
    assert quantize.prune(recipe, options) == [found]
    assert sorted(path.name for path in (both / NAME).iterdir()) == ["main"]
