"""A hub that is somebody's: nothing is sent that was not built, nothing is touched that is not ours, every refusal is
one sentence. In this process, through the real client.
"""

from __future__ import annotations

import builtins
import json
import subprocess
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import hub_server
import pytest
from conftest import run_in_process
from hub_server import TOKEN, HubServer
from test_push import assert_published, tree_of

NAME = "tiny-llama-GPTQ"
REPO = f"local/{NAME}"
Result = subprocess.CompletedProcess[str]
Here = Callable[..., Result]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    found: list[float] = []
    here, sleep = threading.current_thread(), time.sleep

    def wait(seconds: float) -> None:
        if threading.current_thread() is here:  # other threads of this process, such as an extra's, may sleep too
            found.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("quantize.hub.retry.time.sleep", wait)
    return found


@pytest.fixture
def here(hub: HubServer, tiny_recipe: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Here:
    """``here("push", dist, ...)``: a command against the hub in this process."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def call(command: str, dist: Path, *options: Any, recipe: Path = tiny_recipe) -> Result:
        done = run_in_process(command, recipe, "--dist", dist, "--endpoint", hub.url, *options)
        assert TOKEN not in done.stdout + done.stderr
        return done

    return call


def refused(result: Result, *words: str) -> None:
    assert result.returncode in {1, 2, 3}, result.stdout + result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: "), result.stderr
    assert len(error) < 800
    for word in words:
        assert word in error, error


def seed(hub: HubServer, **files: bytes) -> dict[str, bytes]:
    """A repo of somebody's, with these files on main; returns what lies there."""
    repo = hub.repos[REPO] = hub_server.Repo()
    repo.commit("main", {".gitattributes": hub_server.GITATTRIBUTES, **files})
    return dict(repo.tree("main"))


# -- what is published is what was built


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("small", [0, 10**9], ids=["streamed", "small"])
@pytest.mark.parametrize("pushed", [False, True], ids=["new", "there"])
def test_a_flipped_byte_is_never_published(
    hub: HubServer, here: Here, both: Path, pushed: bool, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.publishing.finished.SMALL", small)
    monkeypatch.setattr("quantize.publishing.upload.SMALL", small)
    if pushed:
        assert here("push", both).returncode == 0
    uploaded, commits = hub.uploaded, len(hub.commits())
    weights = both / NAME / "main" / "model.safetensors"
    flip(weights)
    refused(here("push", both, "--only", "main"), str(weights), "it is not what was built", "quantize build")
    refused(here("push", both, "--dry-run"), str(weights))
    assert (hub.uploaded, len(hub.commits())) == (uploaded, commits)


@pytest.mark.parametrize("command", ["git", "card"])
def test_a_flipped_byte_stops_git_and_card(
    command: str, invoke: Here, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    weights = both / NAME / "main" / "model.safetensors"
    flip(weights)
    card = both / NAME / "eight" / "README.md"
    card.write_text("mine\n")
    options = ["--out", tmp_path / "out"] if command == "git" else []
    refused(invoke(command, tiny_recipe, "--dist", both, *options), str(weights), "it is not what was built")
    assert card.read_text() == "mine\n"
    assert not list(tmp_path.glob("out/**/refs/heads/main"))


@pytest.mark.parametrize("name", ["private-notes.txt", "sub/token", "model.safetensors.bak"])
def test_what_no_manifest_names_is_not_sent(
    name: str, hub: HubServer, here: Here, invoke: Here, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    stray = both / NAME / "main" / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("hf_secret")
    refused(here("push", both), name, "move it out")
    refused(invoke("git", tiny_recipe, "--dist", both, "--out", tmp_path / "out"), name)
    assert hub.log == []
    assert not (tmp_path / "out").exists()


def test_each_file_is_read_once(hub: HubServer, here: Here, both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending and hashing together; a second push, which sends nothing, reads each once too."""
    monkeypatch.setattr("quantize.publishing.finished.SMALL", 10_000)
    monkeypatch.setattr("quantize.publishing.upload.SMALL", 10_000)
    read: dict[str, int] = {}
    real, real_path_open = builtins.open, Path.open

    def counted(path: Any, file: Any) -> Any:
        if str(path) not in sizes:
            return file
        plain = file.read

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def read(self, size: int | None = -1) -> bytes:
                data: bytes = plain(size)
                read[str(path)] = read.get(str(path), 0) + len(data)
                return data

        return Counting()

    sizes = {str(path): path.stat().st_size for path in both.rglob("model.safetensors")}
    monkeypatch.setattr(builtins, "open", lambda path, *a, **k: counted(path, real(path, *a, **k)))
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: counted(path, real_path_open(path, *a, **k)))
    assert here("push", both).returncode == 0
    sent = {path: read.get(path, 0) for path in sizes}
    assert sent == sizes
    read.clear()
    assert here("push", both).stdout == "nothing to push\n"
    assert read == sizes


@pytest.mark.parametrize("fault", ["reset", "server"])
def test_a_large_file_goes_in_parts_and_a_part_is_sent_again(
    fault: str, hub: HubServer, here: Here, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("finished", "upload"):
        monkeypatch.setattr(f"quantize.publishing.{room}.SMALL", 10_000)
    hub.part = 20_000
    hub.faults.append(("PUT", hub_server.reset if fault == "reset" else hub_server.status(503)))
    result = here("push", both)
    assert result.returncode == 0, result.stderr
    assert_published(hub, both)


# -- a hub that is somebody's


def test_files_of_others_stay_and_are_named(hub: HubServer, here: Here, both: Path) -> None:
    theirs = {
        "README.md": b"---\nlicense: mit\n---\n# Made by hand\n", "mmproj-f16.gguf": b"GGUF projector",
        "tiny-Q5_K_M.gguf": b"GGUF level", "notes/howto.md": b"read me\n",
    }  # fmt: skip
    seed(hub, **theirs)
    dry = here("push", both, "--dry-run")
    result = here("push", both)
    assert result.returncode == 0, result.stderr
    tree = hub.repos[REPO].tree("main")
    for name, data in theirs.items():
        assert tree[name] == data
        assert name in result.stderr
        assert f"stays   {REPO} main {name}" in dry.stdout
    local = tree_of(both / NAME / "main")
    assert {name: tree[name] for name in local if name != "README.md"} == {
        name: data for name, data in local.items() if name != "README.md"
    }
    assert set(hub.repos[REPO].tree("eight")) == {*tree_of(both / NAME / "eight"), ".gitattributes"}
    assert here("push", both).stdout == "nothing to push\n"
    assert here("push", both, "--overwrite", "README.md").returncode == 0
    assert hub.repos[REPO].tree("main")["README.md"] == local["README.md"]


def test_a_file_of_somebody_else_in_the_place_of_ours_stops_the_push(hub: HubServer, here: Here, both: Path) -> None:
    before = seed(hub, **{"model.safetensors": b"another model"})
    refused(here("push", both), "model.safetensors", "--overwrite")
    assert (hub.repos[REPO].tree("main"), set(hub.repos[REPO].branches)) == (before, {"main"})
    assert here("push", both, "--overwrite", "*").returncode == 0
    assert_published(hub, both)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_somebody_changed_since_is_not_overwritten(
    name: str, hub: HubServer, here: Here, both: Path
) -> None:
    assert here("push", both).returncode == 0
    repo = hub.repos[REPO]
    repo.commit("main", {**repo.tree("main"), name: b"changed by somebody"})
    refused(here("push", both), name, "changed since")
    assert repo.tree("main")[name] == b"changed by somebody"


def test_the_hubs_own_first_card_is_replaced(hub: HubServer, here: Here, both: Path) -> None:
    seed(hub, **{"README.md": b"---\nlicense: mit\n---\n"})
    assert here("push", both).returncode == 0
    assert_published(hub, both)


def test_what_the_release_has_no_more_goes_only_if_it_is_ours(hub: HubServer, here: Here, both: Path) -> None:
    folder = both / NAME / "main"
    manifest = json.loads((folder / "quantize-manifest.json").read_text())
    old = dict(manifest, files={**manifest["files"], "old.json": {"bytes": 2, "sha256": sha256(b"{}")}})
    old["files"]["edited.json"] = {"bytes": 2, "sha256": sha256(b"{}")}
    text = json.dumps(old).encode()
    seed(hub, **{**tree_of(folder), "quantize-manifest.json": text, "old.json": b"{}", "edited.json": b"[]"})
    result = here("push", both)
    assert result.returncode == 0, result.stderr
    assert "deleting" in result.stderr
    tree = hub.repos[REPO].tree("main")
    assert ("old.json" in tree, tree["edited.json"]) == (False, b"[]")


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_prune_offers_what_others_put_there(hub: HubServer, here: Here, both: Path) -> None:
    assert here("push", both).returncode == 0
    repo = hub.repos[REPO]
    repo.commit("main", {**repo.tree("main"), "mmproj.gguf": b"GGUF", "notes.md": b"mine", "README.md": b"edited"})
    listed = json.loads(here("prune", both, "--dry-run", "--json").stdout)
    assert {(row["branch"], row["file"]) for row in listed} == {("main", "mmproj.gguf"), ("main", "notes.md")}
    refused(here("prune", both), "add --yes")
    assert here("prune", both, "--yes", "--keep", "*.gguf").returncode == 0
    tree = repo.tree("main")
    assert ("notes.md" in tree, tree["mmproj.gguf"], tree["README.md"]) == (False, b"GGUF", b"edited")


def test_a_renamed_repo_is_said_and_no_second_one_is_made(hub: HubServer, here: Here, both: Path) -> None:
    assert here("push", both).returncode == 0
    hub.repos["local/New-Name"] = hub.repos.pop(REPO)
    hub.renamed[REPO] = "local/New-Name"
    hub.log.clear()
    for command in ("push", "diff", "prune", "status"):
        refused(here(command, both, *(["--hub"] if command == "status" else [])), "local/New-Name", "release.repo")
    assert set(hub.repos) == {"local/New-Name"}
    assert {method for method, _ in hub.log} <= {"GET", "HEAD"}


def test_private_is_no_word_for_a_public_repo(hub: HubServer, here: Here, both: Path) -> None:
    before = seed(hub)
    refused(here("push", both, "--private"), "is public", "--private")
    assert hub.repos[REPO].tree("main") == before
    del hub.repos[REPO]
    assert here("push", both, "--private").returncode == 0
    assert hub.repos[REPO].private
    assert here("push", both, "--private").returncode == 0


# -- trying again

REQUESTS = [
    "GET /api/models/local/tiny-llama-GPTQ", "repos/create", "/refs", "POST /api/models/local/tiny-llama-GPTQ/branch",
    "/tree/", "/commits/", "validate-yaml", "/preupload/", "objects/batch", "PUT", "verify", "/commit/",
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("fault", ["500", "429", "reset"])
def test_every_request_of_a_push_is_tried_again(
    request_: str, fault: str, hub: HubServer, here: Here, both: Path, waits: list[float]
) -> None:
    hub.verifies = True
    faults = {"500": hub_server.status(500), "429": hub_server.status(429, Retry_After="7"), "reset": hub_server.reset}
    hub.faults.append((request_, faults[fault]))
    result = here("push", both)
    assert result.returncode == 0, result.stderr
    assert hub.faults == []
    assert_published(hub, both)
    assert len(hub.repos[REPO].commits) == 3
    assert f"waiting {'7' if fault == '429' else '1'} s" in result.stderr
    assert waits == [7.0 if fault == "429" else 1.0]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_fault_that_lasts_ends_in_one_sentence(request_: str, hub: HubServer, here: Here, both: Path) -> None:
    hub.verifies = True
    hub.lasting.append((request_, hub_server.status(503)))
    refused(here("push", both), REPO, "status 503")
    hub.lasting.clear()
    assert here("push", both).returncode == 0
    assert_published(hub, both)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "8"}, 8), ({"RateLimit": '"api";r=0;t=9'}, 9), ({"Retry_After": "soon"}, 1), ({}, 1),
        ({"Retry_After": "date"}, 100),
    ],
)  # fmt: skip
def test_the_hub_says_how_long(
    headers: dict[str, str], seconds: int, hub: HubServer, here: Here, both: Path, waits: list[float]
) -> None:
    import time

    if headers.get("Retry_After") == "date":
        headers = {"Retry_After": formatdate(time.time() + 100, usegmt=True)}
    hub.faults.append(("/tree/", hub_server.status(429, **headers)))
    assert here("push", both).returncode == 0
    assert [round(wait, -1) if wait > 20 else wait for wait in waits] == [seconds]


@pytest.mark.parametrize("request_", ["/refs", "/tree/", "PUT", "/commit/"])
def test_an_hour_is_not_slept_through(
    request_: str, hub: HubServer, here: Here, both: Path, waits: list[float]
) -> None:  # fmt: skip
    hub.faults.append((request_, hub_server.status(429, Retry_After="3600")))
    refused(here("push", both), "60 minutes", "UTC", "again")
    assert waits == []
    assert here("push", both).returncode == 0
    assert_published(hub, both)


@pytest.mark.parametrize("code", [404, 422])
def test_an_object_that_the_store_lost_is_sent_again_and_then_said(
    code: int, hub: HubServer, here: Here, both: Path
) -> None:
    hub.verifies = True
    hub.faults.append(("/verify/", hub_server.refusal(code, "Object not found")))
    assert here("push", both).returncode == 0
    assert_published(hub, both)
    del hub.repos[REPO]
    hub.objects.clear()

    def lose(handler: hub_server.Handler) -> bool:
        hub.objects.clear()
        handler.refuse(code, "Object not found")
        return True

    hub.lasting.append(("/verify/", lose))
    refused(here("push", both), "storage did not store the upload")


def test_reads_are_tried_again(hub: HubServer, here: Here, both: Path, invoke: Here) -> None:
    assert here("push", both).returncode == 0
    for word in ("/refs", "/tree/"):
        hub.faults.append((word, hub_server.status(502)))
        assert here("status", both).returncode == 0
        hub.faults.append((word, hub_server.reset))
        assert invoke("lint", REPO, "--endpoint", hub.url).returncode in {0, 2, 3}
        assert hub.faults == []


# -- the hub's own reason

REASONS: dict[str, tuple[str, Any, list[str]]] = {
    "gated": ("/refs", hub_server.refusal(403, "Access restricted", "GatedRepo"), ["gated", "accept its terms"]),
    "read refused": ("/tree/", hub_server.refusal(403, "no read scope"), ["may not read", "no read scope"]),
    "organisation": ("repos/create", hub_server.refusal(403, "You are not in the org"), ["You are not in the org"]),
    "quota": ("/commit/", hub_server.refusal(402, "Private storage limit reached"), ["Private storage limit reached"]),
    "large": ("/commit/", hub_server.refusal(413, "Payload too large"), ["so large", "Payload too large"]),
    "metadata": (
        "validate-yaml", hub_server.data({"errors": [{"message": '"license" must be one of'}]}, 400),
        ["metadata of README.md", '"license" must be one of'],
    ),
    "refused": ("/commit/", hub_server.refusal(400, "Bad file name"), ["Bad file name"]),
    "token in the text": ("/commit/", hub_server.refusal(403, f"{TOKEN} at https://x/y?s=1 " + 5000 * "x"), ["[...]"]),
    "escape": ("/commit/", hub_server.data({"error": "a\x1b[31mb"}, 400), ["a\\x1b[31mb"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_hubs_own_reason_is_shown(name: str, hub: HubServer, here: Here, both: Path) -> None:
    word, fault, words = REASONS[name]
    if name in {"gated", "read refused"}:
        seed(hub)
    hub.lasting.append((word, fault))
    result = here("push", both)
    refused(result, *words)
    if name in {"gated", "read refused"}:
        assert "write" not in result.stderr.splitlines()[-1]


def test_exists_already_with_another_status_is_no_error(hub: HubServer, here: Here, both: Path) -> None:
    def made_meanwhile(handler: hub_server.Handler) -> bool:
        seed(hub)
        handler.refuse(400, "Repository already exists")
        return True

    hub.faults.append(("repos/create", made_meanwhile))
    assert here("push", both).returncode == 0
    assert_published(hub, both)


@pytest.mark.parametrize("request_", [*(word for word in REQUESTS if word != "PUT"), "/resolve/"])
@pytest.mark.parametrize("answer", ["page", "list", "object"])
def test_an_answer_of_another_kind_is_one_sentence(
    request_: str, answer: str, hub: HubServer, here: Here, both: Path, invoke: Here
) -> None:
    hub.verifies = True
    values = {"list": [1], "object": {"branches": [{}], "files": 3}}
    hub.lasting.append((request_, hub_server.page() if answer == "page" else hub_server.data(values[answer])))
    if request_ == "/resolve/":
        seed(
            hub, **{"quantize-manifest.json": b"{}", "README.md": b"x", "model.safetensors": b"y", "config.json": b"{"}
        )
    for done in (
        here("push", both), here("status", both, "--hub"), here("prune", both, "--where", "hub"),
        invoke("lint", REPO, "--endpoint", hub.url),
    ):  # fmt: skip
        assert done.returncode in {0, 1, 2, 3}
        assert done.returncode == 0 or "error" in done.stderr + done.stdout


@pytest.mark.parametrize("token", ["hf_abc…def", "hf_abc def", "hf_äbc"])
def test_a_token_that_cannot_be_one(token: str, here: Here, both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    result = here("push", both)
    refused(result, "HF_TOKEN", "copy it again")
    assert token not in result.stderr


@pytest.mark.parametrize("address", ["hub.example.org", "user:secret@hub.example.org/x", "ftp://hub.example.org"])
def test_an_endpoint_without_its_scheme(address: str, tiny_recipe: Path, both: Path, invoke: Here) -> None:
    result = invoke("push", tiny_recipe, "--dist", both, "--endpoint", address)
    refused(result, "https://hub.example.org")
    assert "secret" not in result.stderr


def test_a_hub_without_xet_gets_the_files_by_lfs(
    hub: HubServer, here: Here, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    result = here("push", both)
    assert result.returncode == 0, result.stderr
    assert "HF_HUB_DISABLE_XET" in result.stderr
    assert_published(hub, both)


# -- names that git would take for something else


def test_a_folder_that_looks_like_an_option(
    invoke: Here, tiny_recipe: Path, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("git", tiny_recipe, "--dist", both, "--out=-o")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "-o" / f"{NAME}.git" / "HEAD").is_file()


@pytest.mark.parametrize("branch", ["HEAD", "refs", "head", "0123456789abcdef0123456789abcdef01234567", "-o", "a.lock"])
def test_a_branch_name_that_git_takes_for_something_else(branch: str, tiny_recipe: Path, invoke: Here) -> None:
    variants = json.dumps([{"branch": branch, "bits": 4, "group_size": 32}])
    refused(invoke("validate", tiny_recipe, "--set", f"gptq.variants={variants}"), branch)
