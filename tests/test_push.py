"""Push: the real client against a small hub, with every fault it may meet. Nothing is lost, nothing half-visible."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import TOKEN, HubServer

REPO = "local/tiny-llama-GPTQ"
Result = subprocess.CompletedProcess[str]


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_published(hub: HubServer, dist: Path) -> None:
    repo = hub.repos[REPO]
    for branch in ("main", "eight"):
        tree = dict(repo.tree(branch))
        assert tree.pop(".gitattributes") == hub_server.GITATTRIBUTES
        assert tree == tree_of(dist / "tiny-llama-GPTQ" / branch)


def test_a_push_makes_repo_and_branches_one_commit_each_main_last(hub: HubServer, run: Any, both: Path) -> None:
    result = run("push", both, alone=True)
    assert result.returncode == 0, result.stderr
    assert_published(hub, both)
    assert [path.rpartition("/")[2] for path in hub.commits()] == ["eight", "main"]
    assert TOKEN not in result.stdout + result.stderr


def test_a_second_push_uploads_nothing_and_commits_nothing(hub: HubServer, run: Any, both: Path) -> None:
    assert run("push", both).returncode == 0
    commits, uploaded = len(hub.commits()), hub.uploaded
    again = run("push", both)
    assert (again.returncode, again.stdout) == (0, "nothing to push\n")
    assert (len(hub.commits()), hub.uploaded) == (commits, uploaded)
    assert run("push", both, "--check").returncode == 0


def test_only_what_differs_is_uploaded_and_what_others_wrote_stays(hub: HubServer, run: Any, both: Path) -> None:
    assert run("push", both).returncode == 0
    uploaded = hub.uploaded
    repo = hub.repos[REPO]
    repo.commit("main", {**repo.tree("main"), "README.md": b"edited by hand\n", "old.safetensors": b"0"})
    plan = json.loads(run("push", both, "--dry-run", "--json").stdout)
    main = next(change for change in plan if change["branch"] == "main")
    assert (list(main["uploads"]), main["deletes"]) == ([], [])
    assert main["stays"] == ["README.md", "old.safetensors"]  # somebody else's
    assert run("push", both, "--check").returncode == 3
    assert run("push", both, "--overwrite", "README.md").returncode == 0
    del repo.tree("main")["old.safetensors"]
    assert_published(hub, both)
    assert hub.uploaded == uploaded


def test_a_dry_run_writes_nothing(hub: HubServer, run: Any, both: Path) -> None:
    result = run("push", both, "--dry-run")
    assert result.returncode == 0
    assert "eight (new)" in result.stdout
    assert hub.repos == {}
    assert all(method in {"GET", "HEAD"} for method, _ in hub.log)


def test_one_branch_alone(hub: HubServer, run: Any, both: Path) -> None:
    assert run("push", both, "--only", "eight").returncode == 0
    assert set(hub.repos[REPO].tree("main")) == {".gitattributes"}
    assert "model.safetensors" in hub.repos[REPO].tree("eight")


FAULTS: dict[str, tuple[str, Any]] = {
    "too many requests": ("/commit/", hub_server.status(429, Retry_After="1")),
    "server error on a commit": ("/commit/", hub_server.status(500)),
    "server error on an upload": ("PUT", hub_server.status(503)),
    "connection reset in an upload": ("PUT", hub_server.reset),
    "upload address expired": ("PUT", hub_server.status(403)),
    "commit made, answer lost": ("/commit/", hub_server.lose_answer),
    "connection reset on a commit": ("/commit/", hub_server.reset),
    "server error on the batch": ("lfs/objects/batch", hub_server.status(502)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_overcome_or_a_rerun_finishes(hub: HubServer, run: Any, both: Path, fault: str) -> None:
    hub.faults.append(FAULTS[fault])
    first = run("push", both)
    assert hub.faults == []
    assert first.returncode in {0, 1}, first.stderr
    if first.returncode:
        assert [line for line in first.stderr.splitlines() if line.startswith("error:")]
        assert set(hub.repos[REPO].tree("main")) == {".gitattributes"}  # main last: never half a release
        assert run("push", both).returncode == 0
    assert_published(hub, both)
    assert "Traceback" not in first.stderr


def test_an_answer_that_was_lost_makes_no_second_commit(hub: HubServer, run: Any, both: Path) -> None:
    hub.faults.append(FAULTS["commit made, answer lost"])
    assert run("push", both).returncode == 0
    assert len(hub.repos[REPO].commits) == 3


def test_a_branch_that_somebody_moved_is_left_alone(hub: HubServer, run: Any, both: Path) -> None:
    assert run("push", both).returncode == 0
    (both / "tiny-llama-GPTQ" / "main" / "README.md").write_text("new\n")
    hub.faults.append(("/commit/main", hub_server.move(REPO, "main")))
    result = run("push", both)
    assert result.returncode == 1
    assert "somebody else moved the branch" in result.stderr
    assert hub.repos[REPO].tree("main")["theirs.txt"] == b"mine now\n"
    assert hub.repos[REPO].tree("main")["README.md"] != b"new\n"
    again = run("push", both)
    assert again.returncode == 0, again.stderr
    tree = hub.repos[REPO].tree("main")
    assert (tree["README.md"], tree["theirs.txt"]) == (b"new\n", b"mine now\n")


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [("/commit/", 403, "may not write"), ("repos/create", 403, "may not write")],
    ids=["commit", "create"],
)
def test_missing_permission(hub: HubServer, run: Any, both: Path, word: str, code: int, message: str) -> None:
    hub.faults.append((word, hub_server.status(code)))
    result = run("push", both)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_token_is_said_and_never_shown(hub: HubServer, run: Any, both: Path) -> None:
    result = run("push", both, token="hf_wrong_and_secret")
    assert result.returncode == 1
    assert "does not accept the token" in result.stderr
    assert "hf_wrong" not in result.stdout + result.stderr
    assert hub.repos == {}


def test_an_unfinished_release_is_not_pushed(hub: HubServer, run: Any, dist: Path) -> None:
    result = run("push", dist)
    assert result.returncode == 2
    assert "gptq/eight: missing" in result.stderr
    assert hub.repos == {}


def test_no_create_leaves_the_hub_alone(hub: HubServer, run: Any, both: Path) -> None:
    result = run("push", both, "--no-create")
    assert result.returncode == 1
    assert "no such repo" in result.stderr
    assert hub.repos == {}
