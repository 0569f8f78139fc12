"""Models on the hub, through the real client against a small server that speaks the part of its API that counts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from outcome import assert_refused

Command = Callable[..., subprocess.CompletedProcess[str]]
REPO = "nobody/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".bin", ".gguf", ".onnx", ".pth")
UNWANTED = ("pytorch_model.bin", "tiny.Q4_0.gguf", "onnx/model.onnx", "consolidated.safetensors")
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"
HEADER_REQUEST = 100_001  # bytes that the client asks for to read a header


class Hub(ThreadingHTTPServer):
    """One repo at one commit.

    Attributes:
        files: the repo's files by name.
        damaged: names of files that arrive with another last byte than their hash says.
        refusal: status and error code for every request, as for a gated repo. once: for the next one.
        page: what every request is answered with, as by a proxy.
        served: (method, file name, bytes of its body) of each answered request for a file.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.commit = COMMIT
        self.damaged: set[str] = set()
        self.refusal: tuple[int, str] | None = None
        self.once: tuple[int, str] | None = None
        self.page: bytes | None = None
        self.served: list[tuple[str, str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> dict[str, int]:
        """Bytes of bodies sent, by file name."""
        total: dict[str, int] = {}
        for method, name, count in self.served:
            if method == "GET":
                total[name] = total.get(name, 0) + count
        return total


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds back a body, 40 ms each, until its header is acknowledged

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch(r"/(?P<api>api/models/)?(?P<repo>[\w.-]+/[\w.-]+)/(?P<verb>\w+)/(?P<rest>.+)", path)
        if once := self.server.once:
            self.server.once = None
            self.refuse(*once)
        elif self.server.page is not None:
            self.send(200, self.server.page, {"Content-Type": "text/html"})
        elif self.server.refusal:
            self.refuse(*self.server.refusal)
        elif not match or match["repo"] != REPO:
            self.refuse(404, "RepoNotFound")
        elif match["rest"].split("/")[0] not in {"main", self.server.commit}:
            self.refuse(404, "RevisionNotFound")
        elif match["api"]:
            self.answer_api(match["verb"])
        else:
            self.answer_file(match["rest"].partition("/")[2])

    do_HEAD = do_GET

    def answer_api(self, verb: str) -> None:
        if verb == "revision":
            siblings = [{"rfilename": name, **described(data, name)} for name, data in self.server.files.items()]
            info: object = {"id": REPO, "modelId": REPO, "sha": self.server.commit, "siblings": siblings}
        else:
            info = [tree_entry(data, name) for name, data in self.server.files.items()]
        self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def answer_file(self, name: str) -> None:
        if name not in self.server.files:
            self.refuse(404, "EntryNotFound")
            return
        data = self.server.files[name]
        facts = described(data, name)
        etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit, "Accept-Ranges": "bytes"}
        if name in self.server.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, size = 200, len(data)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            status, data = 206, data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.server.served.append((self.command, name, len(data)))
        self.send(status, data, headers)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def described(data: bytes, name: str) -> dict:
    """Size and hashes as the hub's API tells them."""
    facts: dict = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if name.endswith(LFS):
        facts["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return facts


def tree_entry(data: bytes, name: str) -> dict:
    """The same as the tree listing words it."""
    facts = described(data, name)
    entry = {"type": "file", "path": name, "size": len(data), "oid": facts["blobId"]}
    if "lfs" in facts:
        entry["lfs"] = {**facts["lfs"], "oid": facts["lfs"]["sha256"]}
    return entry


@pytest.fixture
def hub(sharded_llama: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = Path(shutil.copytree(sharded_llama, tmp_path / "repo"))
    for name in UNWANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed" * 100)
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def quantize(
    run_quantize: Command, invoke: Command, hub: Hub, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """``quantize("plan", ...)``: the command on the tiny recipe with the hub's model, in ``tmp_path``; in this process,
    or with ``alone=True`` in one of its own. Variables are of the hub's client, which reads them on import."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *options: str, alone: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **env,
        }
        overrides = ["--set", f"model.source={REPO}", "--dist", "dist", "--only", "main"]
        if alone:
            return run_quantize(command, tiny_recipe, *overrides, *options, env=variables, cwd=tmp_path)
        with patch.multiple(constants, **as_constants(variables)):
            return invoke(command, tiny_recipe, *overrides, *options)

    return run


def as_constants(variables: dict[str, str]) -> dict[str, object]:
    """What the hub's client makes of its variables."""
    endpoint = variables["HF_ENDPOINT"]
    return {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(Path(variables["HF_HOME"]) / "hub"),
        "HF_HUB_OFFLINE": variables["HF_HUB_OFFLINE"] == "1",
        "HF_HUB_DISABLE_XET": variables["HF_HUB_DISABLE_XET"] == "1",
    }


def test_plan_reads_headers_only(quantize: Command, hub: Hub) -> None:
    result = quantize("plan", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["source"] == {"named": REPO, "commit": COMMIT}
    assert (plan["repos"]["gptq"], plan["linears"], plan["variants"][0]["state"]) == (
        "local/tiny-llama-GPTQ",
        21,
        "missing",
    )
    fetched = hub.fetched()
    shards = [name for name in hub.files if name.startswith("model-")]
    assert len(shards) == 2
    for shard in shards:
        assert 0 < fetched[shard] <= HEADER_REQUEST < len(hub.files[shard])
    assert set(fetched) == {*shards, INDEX, "config.json"}


def test_build_fetches_what_it_needs_and_plan_then_says_fresh(
    quantize: Command, hub: Hub, finished: Path, tmp_path: Path
) -> None:
    built = quantize("build", "--device", "cpu", alone=True)
    assert built.returncode == 0, built.stderr
    assert set(hub.fetched()) == set(hub.files) - set(UNWANTED)

    branch = tmp_path / "dist" / "tiny-llama-GPTQ" / "main"
    source = json.loads((branch / "quantize-manifest.json").read_text())["source"]
    assert (source["name"], source["commit"]) == (REPO, COMMIT)
    assert source["files"][SHARD] == hashlib.sha256(hub.files[SHARD]).hexdigest()
    assert (branch / "LICENSE").read_bytes() == hub.files["LICENSE"]
    local = finished / "tiny-llama-GPTQ" / "main" / "model.safetensors"
    assert (branch / "model.safetensors").read_bytes() == local.read_bytes()

    assert quantize("plan", "--check").returncode == 0
    hub.commit = COMMIT[::-1]  # a new commit with the same files changes nothing that counts
    assert quantize("plan", "--check").returncode == 0
    hub.files["config.json"] += b"\n"
    assert quantize("plan", "--check").returncode == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "model.source=nobody/nothing"], ["nobody/nothing: no such repo on the hub"]),
        (["--set", "model.revision=v9"], [f"{REPO}: the repo has no revision 'v9'"]),
    ],
    ids=["repo", "revision"],
)
def test_what_the_hub_does_not_have_is_named(quantize: Command, options: list[str], words: list[str]) -> None:
    for command in ("plan", "build"):
        assert_refused(quantize(command, *options), *words)


def test_a_gated_repo_says_what_to_do(quantize: Command, hub: Hub) -> None:
    hub.refusal = 403, "GatedRepo"
    assert_refused(quantize("plan"), REPO, "gated", "accept its terms")


def test_no_network_is_one_clear_error(quantize: Command) -> None:
    result = quantize("plan", HF_ENDPOINT="http://127.0.0.1:1")
    assert_refused(result, REPO, "the hub could not be reached", "a local directory works too", code=1)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_what_lies_in_the_cache_works_offline(quantize: Command, hub: Hub, tmp_path: Path, revision: str) -> None:
    pinned = ["--set", f"model.revision={revision}"]
    assert quantize("build", "--device", "cpu", *pinned).returncode == 0
    offline: dict[str, str] = {"HF_HUB_OFFLINE": "1"}
    for how in (offline, {"HF_ENDPOINT": "http://127.0.0.1:1"}):
        result = quantize("plan", "--check", *pinned, **how)  # the same hashes, and so the same keys
        assert result.returncode == 0, result.stderr
        assert f"commit {COMMIT[:12]} from the HF cache" in result.stderr
    other = quantize("plan", "--set", "model.revision=other", alone=True, **offline)
    assert_refused(other, REPO, "is not in the HF cache", code=1)
    cache = tmp_path / "hf" / "hub"
    shutil.rmtree(next(cache.glob("models--*/trees")))
    assert quantize("plan", "--check", *pinned, **offline).returncode == 0  # by the names of the blobs
    shard = next(cache.glob(f"models--*/snapshots/*/{SHARD}"))
    real = shard.resolve()
    data = real.read_bytes()
    real.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert_refused(quantize("build", *pinned, **offline), SHARD, "its SHA-256 differs")
    shard.unlink()
    assert_refused(quantize("plan", *pinned, **offline), SHARD, "is missing")


PAGE = b"<!DOCTYPE html><html>log in</html>"


@pytest.mark.parametrize("body", [PAGE, b"[]", b"{}", b'{"id": 3, "sha": [], "siblings": 7}', b'{"siblings": [{}]}'])
def test_an_answer_of_another_kind_is_one_sentence(quantize: Command, hub: Hub, body: bytes) -> None:
    hub.page = body
    assert_refused(quantize("plan"), REPO, "answered with")


def test_a_read_is_tried_again_and_says_how_long(quantize: Command, hub: Hub) -> None:
    hub.once = 503, "Unavailable"
    result = quantize("plan")
    assert (result.returncode, "waiting 1 s" in result.stderr) == (0, True)


def test_a_shard_that_differs_from_its_hash_is_refused(quantize: Command, hub: Hub, tmp_path: Path) -> None:
    hub.damaged.add(SHARD)
    assert_refused(quantize("build"), SHARD, "its SHA-256 differs from the hub's")
    assert [path.name for path in (tmp_path / "dist").rglob("*")] == [".quantize", "lock"]


def without_shard(files: dict[str, bytes]) -> None:
    del files[SHARD]


def only_pickle(files: dict[str, bytes]) -> None:
    for name in [name for name in files if name.endswith((".safetensors", INDEX))]:
        del files[name]


def strange_dtype(files: dict[str, bytes]) -> None:
    files[SHARD] = files[SHARD].replace(b'"dtype":"F16"', b'"dtype":"F99"')


def replaced(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: data})


BAD_REPOS: dict[str, tuple[Callable[[dict[str, bytes]], None], list[str]]] = {
    "missing-shard": (without_shard, [f"{REPO}: its index names the shard {SHARD}"]),
    "only-pickle": (only_pickle, [f"{REPO}: has its weights only as pickle"]),
    "no-config": (lambda files: files.__delitem__("config.json"), [f"{REPO}: the repo has no config.json"]),
    "config-not-json": (replaced("config.json", b"{"), ["config.json: is not readable JSON"]),
    "index-not-json": (replaced(INDEX, b"["), [INDEX, "is not a safetensors index"]),
    "index-a-list": (replaced(INDEX, b"[]"), [INDEX, "is not a safetensors index"]),
    "strange-dtype": (strange_dtype, [REPO, "has dtype 'F99', which is not supported"]),
    "header-garbage": (replaced(SHARD, b"\xff" * 200_000), [REPO, SHARD]),
    "header-not-json": (replaced(SHARD, (64).to_bytes(8, "little") + b"x" * 200_000), [REPO, SHARD]),
}


@pytest.mark.parametrize("name", BAD_REPOS)
def test_a_bad_repo_is_refused(quantize: Command, hub: Hub, name: str) -> None:
    change, words = BAD_REPOS[name]
    change(hub.files)
    assert_refused(quantize("plan"), *words)
