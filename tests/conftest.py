"""Fixtures that several test files share: a tiny model, finished branches of it, and the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hub_server import TOKEN, HubServer

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]
HANGS = 1800  # seconds after which a child surely hangs, however slow the machine

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: eight, bits: 8, group_size: -1, desc_act: true}
"""


@pytest.fixture(scope="session", autouse=True)
def quantize_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The caller's QUANTIZE_CACHE if there is one, else one that ends with the session."""
    with pytest.MonkeyPatch.context() as patched:
        if not os.environ.get("QUANTIZE_CACHE"):
            patched.setenv("QUANTIZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks in one safetensors file. Shared: copy it before changing it."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint, whose tokenizer llama.cpp knows."""
    import quantize

    path = tmp_path_factory.mktemp("demo") / "r.yaml"
    path.write_text("extends: demo\n")
    return quantize.plan(quantize.load_recipe(path)).source.folder


@pytest.fixture(scope="session")
def sharded_llama(tiny_llama: Path) -> Path:
    """The same model in two shards with an index. Shared: copy it before changing it."""
    from safetensors.torch import load_file, save_file

    folder = tiny_llama.with_name("sharded-llama")
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two branches, ``main`` and ``eight``, of the tiny Llama."""
    from tiny import write_recipe

    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    return write_recipe(path, tiny_llama, VARIANTS, samples=2, compute_dtype="float32")


@pytest.fixture(scope="session")
def finished(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dist in which ``main`` is built and ``eight`` is not. Shared: take ``dist`` to change it."""
    folder = tmp_path_factory.mktemp("finished") / "dist"
    built = run_in_process("build", tiny_recipe, "--dist", folder, "--only", "main", "--device", "cpu")
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="session")
def complete(finished: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dist in which both branches are built. Shared: take ``both`` to change it."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("complete") / "dist"))
    assert run_in_process("build", tiny_recipe, "--dist", folder, "--device", "cpu").returncode == 0
    return folder


@pytest.fixture
def both(complete: Path, tmp_path: Path) -> Path:
    """A dist of one's own in which both branches are built."""
    return Path(shutil.copytree(complete, tmp_path / "dist"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty hub on 127.0.0.1."""
    server = HubServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub: HubServer, tiny_recipe: Path) -> Command:
    """``run("push", dist, ...)`` against the hub, in a process of its own: the client is set up before its import."""

    def call(command: str, dist: Path | None, *options: str, token: str = TOKEN, recipe: Path = tiny_recipe) -> Result:
        environment = {**os.environ, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        code = "import quantize.publishing.push as push; push.FIRST_WAIT = 0.05\nfrom quantize.cli import main; main()"
        of_release = [str(recipe), "--dist", str(dist)] if dist else []
        arguments = [command, *of_release, "--endpoint", hub.url, *options]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGS,
        )  # fmt: skip

    return call


@pytest.fixture
def dist(finished: Path, tmp_path: Path) -> Path:
    """A copy of ``finished`` of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "dist"))


@pytest.fixture(scope="session")
def run_quantize() -> Command:
    """``run_quantize("plan", recipe, env={...}, cwd=...)``: the real command in a process of its own."""

    def run(*arguments: Any, env: dict[str, str] | None = None, cwd: Path | None = None, **options: Any) -> Result:
        command = [sys.executable, "-m", "quantize", *_unmeasured(arguments)]
        variables = {**os.environ, **(env or {})}
        return subprocess.run(
            command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=HANGS, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def invoke() -> Command:
    """``invoke("plan", recipe)``: the same command in this process, fast. What main() lets through fails the test."""
    return run_in_process


def _unmeasured(arguments: tuple[Any, ...]) -> list[str]:
    """A build's arguments; measuring is switched off where the test does not ask for it, as it takes seconds."""
    words = [str(argument) for argument in arguments]
    return [*words, "--no-measure"] if words[:1] == ["build"] and "--measure" not in words else words


def run_in_process(*arguments: Any) -> Result:
    from quantize.cli import main

    command = ["quantize", *_unmeasured(arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
