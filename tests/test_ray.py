"""A build on a local Ray cluster: the bytes of a local build in the same shards, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Result
from outcome import assert_refused, contents
from tiny import write_recipe

from quantize.errors import BuildError

ray: Any = pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of ray's own sockets

VARIANTS = """\
  variants:
    - {branch: main, bits: 4, group_size: 32}
    - {branch: ordered, bits: 8, group_size: -1, desc_act: true}
    - {branch: drifting, bits: 4, group_size: 64, propagate: quantized}
awq:
  variants:
    - {branch: main, bits: 4, group_size: 32}
"""
SHARDED = ("--device", "cpu", "--shards", "2")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "recipe.yaml"
    return write_recipe(path, tiny_llama, VARIANTS, samples=3, compute_dtype="float32")


@pytest.fixture(scope="module")
def local(recipe: Path, invoke: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a build without Ray gives, in the same shards."""
    dist = tmp_path_factory.mktemp("local") / "dist"
    done = invoke("build", recipe, "--dist", dist, *SHARDED)
    assert done.returncode == 0, done.stderr
    return contents(dist)


def build(invoke: Command, recipe: Path, dist: Path) -> Result:
    """On the cluster of these tests."""
    return invoke("build", recipe, "--dist", dist, "--ray", "auto", *SHARDED)


def kill(worker: Any) -> None:
    """End an actor's process the hard way."""
    os.kill(ray.get(worker.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """``killing(method, block, shard)``: the worker of that shard dies just before this call for that block."""
    from quantize.executors.ray_driver import RayStreams

    def arrange(method: str, block: int, shard: int) -> None:
        real, waiting = getattr(RayStreams, method), [True]

        def call(self: RayStreams, index: int, *rest: Any) -> Any:
            if index == block and waiting:
                waiting.clear()
                kill(self._workers[shard])
            return real(self, index, *rest)

        monkeypatch.setattr(RayStreams, method, call)

    return arrange


@pytest.mark.full
def test_the_cluster_gives_the_bytes_of_a_local_build(
    invoke: Command, recipe: Path, local: dict[str, str], tmp_path: Path
) -> None:
    """Nobody is killed: what the next tests show as well, of builds that take another way here and there."""
    done = build(invoke, recipe, tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dist") == local


@pytest.mark.full
def test_the_cluster_gives_the_bytes_of_a_local_build_and_killed_workers_are_replaced(
    invoke: Command,
    recipe: Path,
    local: dict[str, str],
    tmp_path: Path,
    killing: Callable[[str, int, int], None],
) -> None:
    killing("statistics", 1, 0)
    killing("advance", 1, 1)
    done = build(invoke, recipe, tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert "Ray: 1 node, 2 CPUs" in done.stderr
    assert "worker of shard 1 of 2 was lost; a new one goes on from block 1" in done.stderr
    assert "worker of shard 2 of 2 was lost" in done.stderr
    assert contents(tmp_path / "dist") == local


def test_a_build_that_lost_too_many_workers_is_gone_on_with_by_ones_that_do_not_share_the_folder(
    invoke: Command,
    recipe: Path,
    local: dict[str, str],
    tmp_path: Path,
    killing: Callable[[str, int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quantize.executors import ray_driver, ray_tasks

    dist = tmp_path / "dist"
    with monkeypatch.context() as patched:
        patched.setattr(ray_driver, "MOST_LOSSES", 1)
        killing("statistics", 1, 0)
        killing("advance", 1, 0)
        refused = build(invoke, recipe, dist)
    assert "Ray: 1 node, 2 CPUs" in refused.stderr
    assert "worker of shard 1 of 2 was lost; a new one goes on from block 1" in refused.stderr
    assert_refused(refused, "shard 1 of 2 was lost 2 times", "build again", code=1)

    @contextlib.contextmanager
    def elsewhere(folder: Path) -> Iterator[tuple[Path, str]]:
        yield tmp_path / "nothing", "token"

    monkeypatch.setattr(ray_tasks, "probe", elsewhere)
    killing("advance", 1, 0)
    killing("statistics", 2, 1)
    done = build(invoke, recipe, dist)
    assert done.returncode == 0, done.stderr
    assert "going on after block 1 of 3" in done.stderr
    assert "worker of shard 1 of 2 was lost; a new one goes on from block 1" in done.stderr
    assert "worker of shard 2 of 2 was lost; a new one goes on from block 2" in done.stderr
    assert contents(dist) == local


def test_an_error_of_a_worker_is_the_same_sentence() -> None:
    from quantize.executors.ray_driver import _get

    @ray.remote(max_retries=0)
    def fail() -> None:
        raise BuildError("the disk is full")

    with pytest.raises(BuildError) as caught:
        _get(fail.remote())
    assert str(caught.value) == "the disk is full"


def test_a_cluster_that_does_not_answer_is_one_sentence(
    invoke: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody answers\nin time")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    refused = invoke("build", recipe, "--dist", tmp_path / "dist", "--ray", "10.255.0.1:6379")
    assert_refused(refused, "--ray 10.255.0.1:6379", "nobody answers", "ray start --head", code=1)
