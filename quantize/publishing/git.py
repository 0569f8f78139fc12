"""Export finished branches to local git repos: one bare repo per format, with one independent branch per variant.

Weights are LFS pointers whose objects are hard links to dist, so a release takes no more disk space. Written with git's
plumbing commands; git-lfs is needed only to clone or push.
Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import ExportError, ReleaseError
from quantize.planning.plan import Plan
from quantize.publishing.bounds import refuse_out_of_bounds
from quantize.publishing.finished import LocalFile, checked_files, commit_message, finished_folders
from quantize.reporter import SILENT, Reporter

LFS_SUFFIXES = (".safetensors", ".gguf")
LFS_BYTES = 10_000_000
"""The hub accepts no larger files, and no binary ones, outside LFS."""
WHO = {"NAME": "quantize", "EMAIL": "quantize@localhost", "DATE": "1970-01-01T00:00:00Z"}
"""Author and committer unless git's variables name another, so that the same files make the same commit."""
HOOK = """\
#!/bin/sh
# sends the LFS objects before the branches, as `git lfs install` would set it up
command -v git-lfs >/dev/null 2>&1 || { echo >&2 "git-lfs is missing; install it to push this repo"; exit 2; }
git lfs pre-push "$@"
"""


@dataclass(frozen=True)
class WrittenBranch:
    """A branch in a local git repo.

    Attributes:
        folder: the bare repo. commit: the branch's head.
        state: ``new``, ``updated`` or ``unchanged``.
        lfs_files, lfs_bytes: its files in LFS. copied: LFS files that could not be hard-linked.
    """

    repo: str
    branch: str
    folder: Path
    commit: str
    state: str
    lfs_files: int
    lfs_bytes: int
    copied: int


def write_repos(plan: Plan, out: Path, reporter: Reporter = SILENT, *, force: bool = False) -> list[WrittenBranch]:
    """Update the git repos below ``out`` to the finished branches in dist.

    A new branch starts without a parent, a branch that differs gets one more commit, an equal branch stays.

    Args:
        out: folder of ``<repo name>.git``, one bare repo for each of the plan's repos.
        force: write also what is out of the recipe's bounds.

    Raises:
        ReleaseError: a branch is not built, stale, or out of the recipe's bounds, git is missing or fails, or the disk
            cannot be written.
    """
    folders = finished_folders(plan)
    if not force:
        refuse_out_of_bounds(plan, folders)
    files = {folder: checked_files(folder) for folder in folders}
    if shutil.which("git") is None:
        raise ReleaseError("git is not installed, and `quantize git` writes through it; install it (Debian: git)")
    written = []
    for repo in dict.fromkeys(repo for repo, _ in folders.values()):
        bare = _Bare.open(out.absolute() / f"{repo.rsplit('/', 1)[-1]}.git")
        for folder, (owner, branch) in folders.items():
            if owner == repo:
                written.append(
                    _write_branch(
                        bare, repo, branch, files=files[folder], message=commit_message(plan, branch), reporter=reporter
                    )
                )
        known = {item.folder.name for item in plan.everything if item.repo == repo}
        for other in sorted(bare.branches() - known):
            reporter.say(f"{bare.folder}: its branch {other} is not in this recipe")
    return written


def _write_branch(
    bare: _Bare, repo: str, branch: str, *, files: Mapping[str, LocalFile], message: str, reporter: Reporter
) -> WrittenBranch:  # fmt: skip
    reporter.say(f"writing {repo} {branch}")
    large: dict[str, LocalFile] = {}
    blobs: dict[str, str] = {}
    copied = 0
    for name, file in files.items():  # each file is read once, and checked against its manifest
        data = None if name.endswith(LFS_SUFFIXES) or file.nbytes >= LFS_BYTES else file.read()
        if data is not None and b"\0" not in data[:8000]:  # git's own test for text
            blobs[name] = bare.store(data)
            continue
        large[name] = file
        copied += not bare.link(file)
        blobs[name] = bare.store(_pointer(file).encode())
    blobs[".gitattributes"] = bare.store(_attributes(large).encode())
    tree, head = bare.tree(blobs), bare.head(branch)
    state = "new" if head is None else "updated"
    if head is not None and bare.tree_of(head) == tree:
        state, commit = "unchanged", head
    else:
        commit = bare.commit(tree, head, branch, message)
    nbytes = sum(file.nbytes for file in large.values())
    return WrittenBranch(repo, branch, bare.folder, commit, state, len(large), nbytes, copied)


class _Bare:
    """A bare git repo, through git's plumbing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # git sets these for its hooks; they would make the commands here use another repo
        inherited = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"}
        self.environment = {key: value for key, value in os.environ.items() if key not in inherited}
        for role in ("AUTHOR", "COMMITTER"):
            for part, value in WHO.items():
                self.environment.setdefault(f"GIT_{role}_{part}", value)

    @classmethod
    def open(cls, folder: Path) -> _Bare:
        if folder.exists() and not (folder / "objects").is_dir():
            raise ReleaseError(f"{folder}: exists and is not a bare git repo; choose another --out")
        bare = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "HEAD").is_file():
                bare.run("init", "--quiet", "--bare", "--initial-branch=main", "--", str(folder))
            hook = folder / "hooks" / "pre-push"
            hook.parent.mkdir(exist_ok=True)
            hook.write_text(HOOK, encoding="utf-8")
            hook.chmod(0o755)
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written: {error.strerror}") from None
        return bare

    def run(self, *arguments: str, given: bytes = b"", index: str | None = None, tolerate: bool = False) -> str:
        """Output of a git command; empty if it fails and ``tolerate`` is set."""
        environment = {**self.environment, **({"GIT_INDEX_FILE": index} if index else {})}
        command = ["git", "--git-dir", str(self.folder), *arguments]
        done = subprocess.run(command, input=given, env=environment, capture_output=True)
        if done.returncode and not tolerate:
            reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise ExportError(f"{self.folder}: git {arguments[0]} failed: {reason}")
        return "" if done.returncode else done.stdout.decode().strip()

    def store(self, data: bytes) -> str:
        """Store a file in the repo unchanged; return its blob id."""
        return self.run("hash-object", "-w", "--stdin", given=data)

    def link(self, file: LocalFile) -> bool:
        """Put a file among the LFS objects. Returns False if it had to be copied, as on another filesystem."""
        digest = file.hashes[0]
        place = self.folder / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
        if place.is_file() and place.stat().st_size == file.nbytes:
            return True
        temporary = place.with_name(f".{digest}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            linked = _linked(file.path, temporary)
            if not linked:
                shutil.copyfile(file.path, temporary)
                with temporary.open("rb+") as written:
                    os.fsync(written.fileno())
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ExportError(f"{place.parent}: cannot be written: {error.strerror}") from None
        return linked

    def tree(self, blobs: Mapping[str, str]) -> str:
        """Create a tree with these files; return its id."""
        entries = "".join(f"100644 blob {blob}\t{name}\0" for name, blob in sorted(blobs.items()))
        with tempfile.TemporaryDirectory() as scratch:
            index = str(Path(scratch) / "index")
            self.run("update-index", "-z", "--index-info", given=entries.encode(), index=index)
            return self.run("write-tree", index=index)

    def head(self, branch: str) -> str | None:
        return self.run("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", tolerate=True) or None

    def tree_of(self, commit: str) -> str:
        return self.run("rev-parse", f"{commit}^{{tree}}")

    def branches(self) -> set[str]:
        return set(self.run("for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads").split())

    def commit(self, tree: str, parent: str | None, branch: str, message: str) -> str:
        """Commit a tree; the branch moves to it only if its head has not changed since it was read."""
        parents = ["-p", parent] if parent else []
        commit = self.run("commit-tree", tree, *parents, "-m", message)
        self.run("update-ref", f"refs/heads/{branch}", commit, parent or "0" * 40)
        return commit


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
            return False
        raise
    return True


def _pointer(file: LocalFile) -> str:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.nbytes}\n"


def _attributes(large: Mapping[str, LocalFile]) -> str:
    others = [name for name in large if not name.endswith(LFS_SUFFIXES)]
    patterns = [*(f"*{suffix}" for suffix in LFS_SUFFIXES), *(f"/{_literally(name)}" for name in others)]
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)


def _literally(name: str) -> str:
    """A pattern that matches exactly this file name."""
    return re.sub(r"\s", "[[:space:]]", re.sub(r"([\\*?\[\]\"])", r"\\\1", name))
