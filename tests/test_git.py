"""``quantize git``: repos that git and git-lfs check out byte for byte, and push on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Command

NAME = "tiny-llama-GPTQ"
BRANCHES = ("main", "eight")

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
with_lfs = pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed (Debian: git-lfs)")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """A command with LFS set up for this process alone, whatever the user's own configuration says."""
    filters = {"smudge": "git-lfs smudge -- %f", "clean": "git-lfs clean -- %f", "required": "true"}
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_COUNT": str(len(filters))}
    for place, (key, value) in enumerate(filters.items()):
        environment |= {f"GIT_CONFIG_KEY_{place}": f"filter.lfs.{key}", f"GIT_CONFIG_VALUE_{place}": value}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tree_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def test_every_variant_is_a_branch_of_its_own_and_weights_are_links(
    invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    result = invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert [(row["branch"], row["state"], row["copied"]) for row in json.loads(result.stdout)] == [
        ("main", "new", 0), ("eight", "new", 0),
    ]  # fmt: skip
    repo = tmp_path / "out" / f"{NAME}.git"
    run("git", "-C", repo, "fsck", "--strict")
    for branch in BRANCHES:
        folder = both / NAME / branch
        assert run("git", "-C", repo, "rev-list", "--count", branch) == "1"
        listed = run("git", "-C", repo, "ls-tree", "-r", "--name-only", branch).splitlines()
        assert set(listed) == {*tree_of(folder), ".gitattributes"}
        weights = folder / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert run("git", "-C", repo, "show", f"{branch}:model.safetensors").splitlines() == [
            "version https://git-lfs.github.com/spec/v1", f"oid sha256:{digest}", f"size {weights.stat().st_size}",
        ]  # fmt: skip
        assert (repo / "lfs" / "objects" / digest[:2] / digest[2:4] / digest).samefile(weights)
        config = subprocess.check_output(["git", "-C", str(repo), "show", f"{branch}:config.json"])
        assert config == (folder / "config.json").read_bytes()


@with_lfs
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_clone_with_lfs_is_dist_byte_for_byte(
    branch: str, invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    notes = both / NAME / "eight" / "big notes*.txt"
    notes.write_bytes(b"a file \0 of bytes\n")
    manifest = json.loads((notes.parent / "quantize-manifest.json").read_text())
    digest = hashlib.sha256(notes.read_bytes()).hexdigest()
    manifest["files"][notes.name] = {"bytes": notes.stat().st_size, "sha256": digest}
    (notes.parent / "quantize-manifest.json").write_text(json.dumps(manifest))
    assert invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out").returncode == 0
    run("git", "clone", "--quiet", "--branch", branch, tmp_path / "out" / f"{NAME}.git", tmp_path / "clone")
    assert run("git", "-C", tmp_path / "clone", "status", "--porcelain") == ""
    cloned = tree_of(tmp_path / "clone")
    assert b"filter=lfs" in cloned.pop(".gitattributes")
    assert cloned == tree_of(both / NAME / branch)


@with_lfs
def test_push_sends_the_objects_too(invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path) -> None:
    assert invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out").returncode == 0
    elsewhere = tmp_path / "elsewhere.git"
    run("git", "init", "--quiet", "--bare", elsewhere)
    run("git", "-C", tmp_path / "out" / f"{NAME}.git", "push", "--quiet", "--all", elsewhere.as_uri())
    run("git", "clone", "--quiet", "--branch", "eight", elsewhere.as_uri(), tmp_path / "clone")
    weights = both / NAME / "eight" / "model.safetensors"
    assert (tmp_path / "clone" / "model.safetensors").read_bytes() == weights.read_bytes()


def test_again_changes_nothing_and_a_change_is_one_commit_more(
    invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    def write(out: str) -> dict[str, tuple[str, str]]:
        rows = json.loads(invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / out, "--json").stdout)
        return {row["branch"]: (row["state"], row["commit"]) for row in rows}

    first, again, elsewhere = write("out"), write("out"), write("other")
    assert [state for state, _ in again.values()] == ["unchanged", "unchanged"]
    assert elsewhere == first  # the same files make the same commits
    assert [again[name][1] for name in BRANCHES] == [first[name][1] for name in BRANCHES]
    (both / NAME / "main" / "README.md").write_text("# a better card\n")
    changed = write("out")
    assert (changed["main"][0], changed["eight"][0]) == ("updated", "unchanged")
    repo = tmp_path / "out" / f"{NAME}.git"
    assert run("git", "-C", repo, "rev-parse", "main^") == first["main"][1]
    assert run("git", "-C", repo, "show", "main:README.md") == "# a better card"


def test_an_unfinished_release_writes_nothing(
    invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:  # fmt: skip
    shutil.rmtree(both / NAME / "eight")
    result = invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "gptq/eight: missing, not built yet; run `quantize build` first" in result.stderr
    assert not (tmp_path / "out").exists()
    assert invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out", "--only", "main").returncode == 0


def test_a_folder_that_is_something_else_is_left_alone(
    invoke: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / f"{NAME}.git").mkdir(parents=True)
    (tmp_path / "out" / f"{NAME}.git" / "mine.txt").write_text("mine")
    result = invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out")
    assert (result.returncode, "is not a bare git repo" in result.stderr) == (2, True)
    assert [path.name for path in (tmp_path / "out" / f"{NAME}.git").iterdir()] == ["mine.txt"]
