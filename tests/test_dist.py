"""A dist: what looks changes nothing, what writes holds the lock, and what is somebody else's stays as it is."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from hub_server import HubServer
from outcome import assert_refused, contents
from tiny import write_model, write_recipe

import quantize
from quantize.dist.layout import Dist, locked, place_problem
from quantize.dist.ledger import oddities
from quantize.dist.manifest import MANIFEST_NAME, read_manifest, update, with_level, with_quality, without_level
from quantize.dist.origins import remember_origins
from quantize.errors import BuildError, PlanError
from quantize.options import PlanOptions
from quantize.planning.ownership import other_owner
from quantize.planning.planner import plan_recipe
from quantize.recipe import load_recipe

NAME = "tiny-llama-GPTQ"
Tree = dict[str, tuple[int, int, bytes | str]]


def tree(folder: Path) -> Tree:
    """Every entry below a folder and the folder itself: mode, time of its last change, and bytes or a link's target."""
    found: Tree = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        entry = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(entry.st_mode):
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = entry.st_mode, entry.st_mtime_ns, content
    return found


@contextmanager
def lock_of_another(dist: Path) -> Iterator[None]:
    with (dist / ".quantize" / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- what only looks

LOOKS: dict[str, list[str]] = {
    "plan": ["plan", "{recipe}", "--dist", "{dist}"],
    "status": ["status", "{recipe}", "--dist", "{dist}"],
    "explain": ["explain", "{recipe}", "--dist", "{dist}"],
    "clean": ["clean", "--dist", "{dist}", "--dry-run"],
    "prune": ["prune", "{recipe}", "--dist", "{dist}", "--where", "dist", "--dry-run"],
    "prune, nobody to ask": ["prune", "{recipe}", "--dist", "{dist}", "--where", "dist"],
    "gc": ["gc", "--older-than", "0", "--dry-run"],
    "gc, nobody to ask": ["gc", "--older-than", "0"],
    "lint": ["lint", "{dist}/" + NAME],
    "verify": ["verify", "{dist}/" + NAME, "--no-load"],
    "card": ["card", "{recipe}", "--dist", "{dist}", "--print", "gptq"],
}


@pytest.fixture
def littered(both: Path, tmp_path: Path) -> Path:
    """A dist with what a killed build left, an unfinished build, and files of the user's own in every corner."""
    for name in (".notes.12.tmp", f"{NAME}/.diary.1234.tmp", f"{NAME}/main/.README.md.99.tmp"):
        (both / name).write_text("the user's own")
    work = both / ".quantize"
    (work / "tmp").mkdir()
    (work / "tmp" / ".README.md.1-ab.tmp").write_text("half")
    (work / "replaced" / NAME / "old").mkdir(parents=True)
    (work / "replaced" / NAME / "old" / "config.json").write_text("{}")
    return both


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache" / "statistics" / "x").mkdir(parents=True)
    (tmp_path / "cache" / "statistics" / "x" / "part").write_text("kept")
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", LOOKS)
def test_what_only_looks_changes_nothing(
    name: str, invoke: Command, littered: Path, tiny_recipe: Path, tmp_path: Path, cache: Path
) -> None:
    smaller = tmp_path / "smaller.yaml"
    smaller.write_text("".join(line for line in tiny_recipe.read_text().splitlines(True) if "eight" not in line))
    before, kept = tree(littered), tree(cache / "statistics")
    result = invoke(*(word.format(recipe=smaller, dist=littered) for word in LOOKS[name]))
    assert "Traceback" not in result.stderr
    assert (tree(littered), tree(cache / "statistics")) == (before, kept)
    if "nobody to ask" in name:
        assert_refused(result, "add --yes")


@pytest.mark.parametrize("name", [name for name in LOOKS if name not in {"lint", "verify"}])
def test_what_only_looks_makes_no_dist(
    name: str, invoke: Command, tiny_recipe: Path, tmp_path: Path, cache: Path
) -> None:
    invoke(*(word.format(recipe=tiny_recipe, dist=tmp_path / "dist") for word in LOOKS[name]))
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("command", ["measure", "card"])
def test_a_command_that_needs_finished_work_makes_no_dist(
    command: str, invoke: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    assert_refused(invoke(command, tiny_recipe, "--dist", tmp_path / "dist"), "run `quantize build` first")
    assert not (tmp_path / "dist").exists()


def test_a_push_that_only_shows_changes_nothing(hub: HubServer, run: Command, littered: Path) -> None:
    shutil.rmtree(littered / ".quantize" / "replaced")
    before = tree(littered)
    assert run("push", littered, "--dry-run").returncode == 0
    assert run("diff", littered).returncode == 0
    assert tree(littered) == before
    assert not hub.repos


def test_clean_without_a_terminal_says_add_yes(invoke: Command, both: Path) -> None:
    from quantize.dist.resume import Block, State, open_unfinished

    inputs: dict[str, Any] = {"statistics": "gathered"}
    state = State(inputs, {"gptq/main": "0"}, False, 3)
    open_unfinished(both, [state]).keep(Block(1, (1, 1, 1)), None)
    before = tree(both)
    assert_refused(invoke("clean", "--dist", both), "add --yes")
    assert tree(both) == before
    assert invoke("clean", "--dist", both, "--yes").returncode == 0
    assert not (both / ".quantize" / "unfinished" / state.key).exists()


# -- what writes

OWN = {".notes.12.tmp", f"{NAME}/.diary.1234.tmp", f"{NAME}/main/.README.md.99.tmp"}


def test_only_the_work_folder_is_ever_cleared(invoke: Command, littered: Path, tiny_recipe: Path) -> None:
    assert invoke("clean", "--dist", littered, "--yes").returncode == 0
    assert invoke("build", tiny_recipe, "--dist", littered).returncode == 0
    assert invoke("card", tiny_recipe, "--dist", littered).returncode == 0
    assert {name for name in OWN if (littered / name).read_text() == "the user's own"} == OWN
    assert sorted(path.name for path in (littered / ".quantize").iterdir()) == ["lock", "origins.json"]
    assert (littered / NAME / "old" / "config.json").is_file(), "a branch that was being replaced is back"


def test_a_work_folder_that_is_a_link_is_not_cleared(invoke: Command, both: Path, tiny_recipe: Path) -> None:
    precious = both.parent / "precious"
    (both / ".quantize").rename(precious)
    (precious / "photos").mkdir()
    (both / ".quantize").symlink_to(precious)
    for command in (["build", tiny_recipe], ["card", tiny_recipe], ["clean", "--yes"]):
        assert_refused_or_failed(invoke(*command, "--dist", both), "is a link")
    assert (precious / "photos").is_dir()


def assert_refused_or_failed(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence, whatever its code."""
    assert result.returncode not in {0, 130}
    assert "Traceback" not in result.stderr
    assert [word for word in words if word not in result.stderr.splitlines()[-1]] == []


@pytest.mark.parametrize("command", ["card", "measure", "prune"])
def test_what_writes_waits_for_no_build(
    command: str, invoke: Command, both: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe
    if command == "prune":
        recipe = tmp_path / "smaller.yaml"
        recipe.write_text("".join(line for line in tiny_recipe.read_text().splitlines(True) if "eight" not in line))
    before = contents(both)
    options = ["--where", "dist", "--yes"] if command == "prune" else []
    with lock_of_another(both):
        assert_refused_or_failed(invoke(command, recipe, "--dist", both, *options), "another build is running in it")
    assert contents(both) == before


def verified(invoke: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.CompletedProcess[str]:
    """``verify`` of a branch, which a consumer of ours loads."""
    from quantize.verifying.checks import Check

    with monkeypatch.context() as patched:
        patched.setattr("quantize.verifying.loaders.check_gptq_or_awq", lambda folder: [Check("ours 1.0", "ok", "so")])
        result = invoke("verify", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_verify_notes_in_a_dist_only_and_under_its_lock(
    invoke: Command, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = both / NAME / "eight"
    elsewhere = Path(shutil.copytree(branch, tmp_path / "somebody" / "repo" / "eight"))
    before = tree(tmp_path / "somebody")
    assert "is not in a dist" in verified(invoke, elsewhere, monkeypatch).stderr
    assert tree(tmp_path / "somebody") == before
    with lock_of_another(both):
        assert "another build is running" in verified(invoke, branch, monkeypatch).stderr
    assert "loads_in" not in json.loads((branch / MANIFEST_NAME).read_text())
    assert verified(invoke, branch, monkeypatch).stderr.count("not recorded") == 0
    assert json.loads((branch / MANIFEST_NAME).read_text())["loads_in"] == {"ours 1.0": "ok"}
    assert verified(invoke, both / NAME, monkeypatch).returncode == 0
    assert not list((both / NAME).rglob("*.tmp"))


# -- manifests


def test_a_manifest_is_changed_whole_or_not_at_all(both: Path) -> None:
    folder = both / NAME / "main"
    first = read_manifest(folder)
    with locked(both) as held:
        with pytest.raises(BuildError, match="would not be sound"):
            update(held, folder, lambda known: {**(known or {}), "files": {"../x": {"bytes": 1, "sha256": "0" * 64}}})
        with pytest.raises(BuildError, match="does not lie in"):
            update(held, both.parent, lambda known: {"schema": 1})
        times = (folder / MANIFEST_NAME).stat().st_mtime_ns
        assert update(held, folder, lambda known: known or {}) == first
    assert (folder / MANIFEST_NAME).stat().st_mtime_ns == times
    assert read_manifest(folder) == first


def test_changes_of_a_manifest_leave_the_one_they_are_made_from() -> None:
    empty: dict[str, Any] = {"schema": 1}
    two = with_level(with_level(empty, "Q8_0", {"files": {}}), "Q4_0", {"files": {}})
    assert list(two["levels"]) == ["Q4_0", "Q8_0"]
    measured = with_quality(two, {"key": "k"}, "Q4_0")
    assert "quality" not in two["levels"]["Q4_0"]
    assert without_level(measured, "Q8_0")["levels"] == {"Q4_0": {"files": {}, "quality": {"key": "k"}}}
    assert empty == {"schema": 1}


def test_one_module_writes_manifests() -> None:
    """Whatever opens, replaces or writes a file called as manifests are is in ``dist/manifest.py``."""
    package = Path(quantize.__file__).parent
    writers = {"write", "write_atomically", "write_bytes", "write_text", "open", "replace", "rename", "copy",
               "copy_file", "replacing", "symlink_to", "unlink"}  # fmt: skip
    found = set()
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name not in writers:
                    continue
                text = " ".join(ast.get_source_segment(source, part) or "" for part in [node.func, *node.args])
                if "MANIFEST_NAME" in text or MANIFEST_NAME in text:
                    found.add(path.relative_to(package).as_posix())
    assert found == {"dist/manifest.py"}


def test_a_branch_on_another_filesystem_is_named_before_any_work(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second filesystem here")
    with pytest.MonkeyPatch.context() as patched:
        real = Path.stat

        def mounted(path: Path, **options: Any) -> os.stat_result:
            return real(other if path.name == "tiny" else path, **options)

        (tmp_path / "tiny").mkdir()
        patched.setattr(Path, "stat", mounted)
        assert "another filesystem" in str(place_problem(tmp_path, tmp_path / "tiny" / "main"))
    assert place_problem(tmp_path, tmp_path / "tiny" / "main") is None
    (tmp_path / "file").write_text("x")
    away = other / f"quantize-test-{os.getpid()}"
    try:
        with pytest.raises(BuildError, match="keep one dist on one filesystem"):
            Dist(tmp_path).write(away, b"x")
        assert not away.exists()
    finally:
        away.unlink(missing_ok=True)


# -- two models of one name


@pytest.fixture
def twins(tmp_path: Path, tiny_llama: Path) -> tuple[Path, Path]:
    """Recipes of two models that share tokenizer, config and the name of their folders, but no weight."""
    recipes = []
    for number in (0, 1):
        model = tmp_path / f"place{number}" / "model"
        if number == 0:
            shutil.copytree(tiny_llama, model)
        else:
            shutil.copytree(tmp_path / "place0" / "model", model)
            retrained(model)
        recipes.append(write_recipe(tmp_path / f"r{number}.yaml", model, samples=2, compute_dtype="float32"))
    return recipes[0], recipes[1]


def retrained(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


def states(invoke: Command, recipe: Path, dist: Path, *options: str) -> set[str]:
    shown = invoke("plan", recipe, "--dist", dist, "--json", *options)
    assert shown.returncode == 0, shown.stderr
    return {row["state"] for row in json.loads(shown.stdout)["variants"]}


def test_two_models_of_one_name_do_not_overwrite_each_other(
    invoke: Command, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = twins
    dist = tmp_path / "dist"
    assert invoke("build", first, "--dist", dist, "--device", "cpu").returncode == 0
    before = contents(dist)
    assert states(invoke, first, dist) == {"fresh"}
    assert states(invoke, second, dist) == {"taken"}
    assert "another model" in invoke("plan", second, "--dist", dist).stdout
    for command in ("build", "card", "measure"):
        refused = invoke(command, second, "--dist", dist)
        assert_refused(refused, dist / "model-GPTQ", "'model' in another folder", tmp_path / "place1", "release.repo")
    refused = invoke("prune", second, "--dist", dist, "--where", "dist", "--yes")
    assert_refused(refused, "another model")
    assert_refused(invoke("git", second, "--dist", dist, "--out", tmp_path / "git"), "taken")
    assert contents(dist) == before
    # each way out that the sentence names
    apart = invoke("plan", second, "--dist", dist, "--set", "release.repo=me/other-{METHOD}", "--json")
    assert {row["state"] for row in json.loads(apart.stdout)["variants"]} == {"missing"}
    shutil.rmtree(dist / "model-GPTQ")
    assert states(invoke, second, dist) == {"missing"}


def test_a_model_that_was_trained_further_or_moved_is_the_same(
    invoke: Command, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    first, dist = twins[0], tmp_path / "dist"
    assert invoke("build", first, "--dist", dist, "--device", "cpu").returncode == 0
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(tmp_path / "place0" / "model", moved)
    assert states(invoke, first, dist, "--set", f"model.source={moved}") == {"fresh"}
    retrained(tmp_path / "place0" / "model")
    assert states(invoke, first, dist) == {"stale"}
    assert invoke("build", first, "--dist", dist, "--device", "cpu").returncode == 0
    assert states(invoke, first, dist) == {"fresh"}


def test_a_dist_of_an_older_version_is_read_gently(
    invoke: Command, twins: tuple[Path, Path], tmp_path: Path, tiny_llama: Path
) -> None:
    first, second = twins
    dist = tmp_path / "dist"
    assert invoke("build", first, "--dist", dist, "--device", "cpu").returncode == 0
    (dist / ".quantize" / "origins.json").unlink()
    assert states(invoke, second, dist) == {"stale"}  # nothing tells it from the same model, trained further
    other = write_model(tmp_path / "place2" / "model", "qwen2")
    for path in other.iterdir():  # nor one file in common
        if path.suffix in {".json", ".jinja", ".md"} or path.name == "LICENSE":
            path.write_bytes(path.read_bytes() + b"\n")
    assert states(invoke, first, dist, "--set", f"model.source={other}") == {"taken"}
    for name in ("origins.json", "lock"):
        (dist / ".quantize" / name).write_text("{" * 5000)
    assert states(invoke, first, dist) == {"fresh"}


def test_what_an_older_version_remembered_in_the_lock_file_holds(
    invoke: Command, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = twins
    work = tmp_path / "dist" / ".quantize"
    assert invoke("build", first, "--dist", tmp_path / "dist", "--device", "cpu").returncode == 0
    (work / "origins.json").replace(work / "lock")
    assert states(invoke, second, tmp_path / "dist") == {"taken"}
    with locked(tmp_path / "dist") as held:
        remember_origins(held, {"another": "hub:a/b"})
    assert len(json.loads((work / "origins.json").read_text())["origins"]) == 2
    assert states(invoke, second, tmp_path / "dist") == {"taken"}


def test_a_lock_that_is_a_link_is_not_followed(both: Path, tmp_path: Path) -> None:
    lock = both / ".quantize" / "lock"
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="cannot be written"), locked(both):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_lock_is_refused_while_it_is_held_and_free_after_an_error(both: Path) -> None:
    def fail() -> None:
        with locked(both):
            with pytest.raises(BuildError, match="another build is running in it"), locked(both):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with locked(both):
        pass


def test_a_filesystem_without_locks_is_one_sentence(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BuildError, match="cannot be locked on its filesystem: Function not implemented"), locked(both):
        pass


@pytest.mark.parametrize("known", [True, False], ids=["remembered", "older version"])
def test_a_model_of_the_hub_is_not_a_local_one_of_its_name(both: Path, tiny_recipe: Path, known: bool) -> None:
    for branch in ("main", "eight"):
        path = both / NAME / branch / MANIFEST_NAME
        data = json.loads(path.read_text())
        data["source"] = {
            "name": "alice/tiny-llama", "commit": "a" * 40, "files": dict.fromkeys(data["source"]["files"], "0" * 64),
        }  # fmt: skip
        path.write_text(json.dumps(data))
    (both / ".quantize" / "origins.json").unlink()
    if known:
        with locked(both) as held:
            remember_origins(held, {NAME: "hub:alice/tiny-llama"})
    plan = plan_recipe(load_recipe(tiny_recipe), PlanOptions(dist=both))
    assert {item.state for item in plan.everything} == {"taken"}
    with pytest.raises(PlanError, match=r"'alice/tiny-llama' of the hub"):
        plan.require_own()


def test_what_is_the_same_model(both: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    source = plan_recipe(load_recipe(tiny_recipe), PlanOptions(dist=both)).source
    repo = both / NAME
    on_hub = replace(source, hub_id="Alice/Tiny-Llama", named="Alice/Tiny-Llama", commit="b" * 40)
    assert other_owner(repo, source) is None
    assert other_owner(repo, on_hub) is None, "the same weights, now named by their id"
    for branch in ("main", "eight"):
        path = repo / branch / MANIFEST_NAME
        data = json.loads(path.read_text())
        files = dict.fromkeys(data["source"]["files"], "0" * 64)
        path.write_text(json.dumps({**data, "source": {"name": "alice/tiny-llama", "commit": "a", "files": files}}))
    assert other_owner(repo, on_hub) is None, "a newer commit"
    bobs = replace(on_hub, hub_id="bob/tiny-llama")
    assert other_owner(repo, bobs) == "'alice/tiny-llama' of the hub"
    path.write_text(json.dumps({**data, "source": [1]}))
    assert other_owner(both / "nothing-here", bobs) is None


@pytest.mark.parametrize("outcome", ["external", "foreign"])
def test_modules_of_another_engine_are_no_oddity_in_old_manifests_either(outcome: str) -> None:
    rows = [{"module": "fine", "outcome": outcome}, {"module": "odd", "outcome": "rtn_fallback"}]
    assert oddities(rows) == {"rtn_fallback": ["odd"]}
