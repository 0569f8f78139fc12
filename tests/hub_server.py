"""A small hub on 127.0.0.1: repos, refs, trees, LFS and commits, as the real client asks for them; faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_testtoken"
LFS = (".safetensors", ".gguf", ".bin")
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

Tree = dict[str, bytes]


@dataclass
class Repo:
    """Commits by id (their trees, oldest first), branches by name, and whether it is private."""

    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, tree: Tree) -> str:
        name = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = tree
        self.branches[branch] = name
        return name

    def tree(self, branch: str) -> Tree:
        return self.commits[self.branches[branch]]


Fault = Callable[["Handler"], bool]
"""Answers a request instead of the hub; True if it did."""


class HubServer(ThreadingHTTPServer):
    """The hub.

    Attributes:
        faults: by a word of the request (``commit``, ``lfs``, ``PUT``...), faults that each strike once.
        lasting: as faults, but they strike each time. renamed: repos by their old names.
        verifies: whether uploads have to be confirmed, as some stores want it. part: bytes of a part of a large
            upload; None takes each in one piece.
        uploaded: bytes of LFS objects received. downloaded: bytes of files sent. log: (method, path) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[tuple[str, Fault]] = []
        self.lasting: list[tuple[str, Fault]] = []
        self.renamed: dict[str, str] = {}
        self.verifies = False
        self.part: int | None = None
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploaded = self.downloaded = 0
        self.log: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commits(self) -> list[str]:
        """Paths of the commits that were asked for, in order."""
        return [path for method, path in self.log if method == "POST" and "/commit/" in path]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds back a body, 40 ms each, until its header is acknowledged

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for place, (word, fault) in enumerate(self.server.faults):
            if word in f"{self.command} {path}":
                del self.server.faults[place]
                if fault(self):
                    return
                break
        for word, fault in self.server.lasting:
            if word in f"{self.command} {path}" and fault(self):
                return
        for old, new in self.server.renamed.items():
            if re.search(rf"/{old}(?=[/.]|$)", path):
                return self.answer({}, 307, {"Location": self.path.replace(old, new, 1)})
        if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid credentials")
        self.route(path)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def route(self, path: str) -> None:
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/objects/"):
            return self.receive(path)
        if path.startswith("/verify/"):
            known = json.loads(self.body)["oid"] in self.server.objects
            return self.answer({}) if known else self.refuse(404, "Object not found")
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path)
        if not match or match[1] not in self.server.repos:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        repo, verb, rest = self.server.repos[match[1]], match[2], match[3]
        if verb == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": at} for name, at in repo.branches.items()
            ]
            return self.answer({"branches": refs, "tags": [], "converts": []})
        if verb == "tree":
            return self.answer([entry(name, data) for name, data in sorted(repo.commits[self.at(repo, rest)].items())])
        if verb == "paths-info":
            tree, asked = repo.commits[self.at(repo, rest)], self.asked_paths()
            return self.answer([entry(name, tree[name]) for name in asked if name in tree])
        if verb == "commits":
            listed = [{"id": name, "title": "", "date": "2026-01-01T00:00:00.000Z", "message": "", "authors": []}
                      for name in reversed(repo.commits)]  # fmt: skip
            return self.answer(listed)
        if verb == "branch" and self.command == "DELETE":
            del repo.branches[rest]
            return self.answer({})
        if verb == "branch":
            start = json.loads(self.body).get("startingPoint", "main")
            repo.branches[rest] = self.at(repo, start)
            return self.answer({})
        if verb == "preupload":
            asked = json.loads(self.body)["files"]
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                 "shouldIgnore": False} for file in asked
            ]  # fmt: skip
            return self.answer({"files": files})
        if verb == "commit":
            return self.commit(match[1], rest)
        if verb in {None, "revision"}:
            head = self.at(repo, rest or "main")
            about = {"id": match[1], "modelId": match[1], "sha": head, "siblings": [], "private": repo.private}
            return self.answer(about)
        return self.refuse(404, f"no such thing: {path}")

    def resolve(self, named: str, revision: str, name: str) -> None:
        """A file, or the range of it that is asked for."""
        if named not in self.server.repos:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        repo = self.server.repos[named]
        head = self.at(repo, revision)
        data = repo.commits[head].get(name)
        if data is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2] or len(data) - 1)) if match else (0, len(data) - 1)
        body = data[first : last + 1]
        self.server.downloaded += len(body) if self.command == "GET" else 0
        self.send_response(206 if match else 200)
        self.send_header("X-Repo-Commit", head)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        if match:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def asked_paths(self) -> list[str]:
        """The names in a request that is JSON or a form."""
        if self.body.startswith(b"{"):
            return list(json.loads(self.body)["paths"])
        return parse_qs(self.body.decode()).get("paths", [])

    def at(self, repo: Repo, revision: str) -> str:
        return repo.branches.get(revision, revision)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos:
            return self.answer({"error": "You already created this repo", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.server.repos[name].commit("main", {".gitattributes": GITATTRIBUTES})
        self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def batch(self) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            known = item["oid"] in self.server.objects
            objects.append({**item, **({} if known else {"actions": self.actions(item)})})
        self.answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def actions(self, item: dict[str, Any]) -> dict[str, Any]:
        """How an object is to be uploaded."""
        address, part = f"{self.server.url}/objects/{item['oid']}", self.server.part
        header = {}
        if part is not None:
            count = -(-item["size"] // part)
            header = {"chunk_size": str(part), **{f"{n:05d}": f"{address}/{n}" for n in range(1, count + 1)}}
        confirm = {"verify": {"href": f"{self.server.url}/verify/{item['oid']}"}} if self.server.verifies else {}
        return {"upload": {"href": address, "header": header}, **confirm}

    def receive(self, path: str) -> None:
        name = path.split("/")[2]
        parts = self.server.parts.setdefault(name, {})
        if (number := path.rpartition("/")[2]) != name:
            parts[int(number)] = self.body
            return self.answer({}, headers={"ETag": f'"{number}"'})
        if self.command == "POST":  # all parts are there
            self.body = b"".join(parts[number] for number in sorted(parts))
        if hashlib.sha256(self.body).hexdigest() != name:
            return self.refuse(400, "hash mismatch")
        self.server.objects[name] = self.body
        self.server.uploaded += len(self.body)
        self.answer({})

    def commit(self, named: str, branch: str) -> None:
        repo = self.server.repos[named]
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in {None, repo.branches[branch]}:
            return self.refuse(412, "The branch moved")
        tree = dict(repo.tree(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        name = repo.commit(branch, tree)
        self.answer(
            {
                "success": True,
                "commitOid": name,
                "commitUrl": f"{self.server.url}/{named}/commit/{name}",
                "hookOutput": "",
            }
        )

    def answer(
        self, data: Any, status: int = 200, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def log_message(self, *arguments: object) -> None:
        pass


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as the tree listing words it."""
    pointer = data
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
    if name.endswith(LFS):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
    found["oid"] = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return found


# -- faults


def status(code: int, **headers: str) -> Fault:
    """Answer with a status."""

    def fault(handler: Handler) -> bool:
        handler.refuse(code, "as asked", headers={key.replace("_", "-"): value for key, value in headers.items()})
        return True

    return fault


def page(code: int = 200) -> Fault:
    """Answer with a web page, as a proxy or a login does."""

    def fault(handler: Handler) -> bool:
        body = b"<!DOCTYPE html><html><body>Please log in</body></html>"
        handler.send_response(code)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return fault


def data(value: Any, code: int = 200) -> Fault:
    """Answer with this JSON."""

    def fault(handler: Handler) -> bool:
        handler.answer(value, code)
        return True

    return fault


def refusal(code: int, message: str, error_code: str = "") -> Fault:
    """Refuse in the hub's own words."""

    def fault(handler: Handler) -> bool:
        handler.refuse(code, message, error_code)
        return True

    return fault


def reset(handler: Handler) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()
    return True


def lose_answer(handler: Handler) -> bool:
    """Do what is asked, then close the connection instead of answering."""
    answer = handler.answer
    handler.answer = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    handler.route(unquote(urlsplit(handler.path).path))
    handler.answer = answer  # type: ignore[method-assign]
    return reset(handler)


def move(repo: str, branch: str) -> Fault:
    """Somebody else commits to a branch just before this request."""

    def fault(handler: Handler) -> bool:
        found = handler.server.repos[repo]
        found.commit(branch, {**found.tree(branch), "theirs.txt": b"mine now\n"})
        return False

    return fault
