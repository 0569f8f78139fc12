"""One number of threads, honoured and given back; the same bytes with one thread and with several."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command
from outcome import contents
from tiny import EVERY_WAY, write_model, write_recipe
from torch.nn import functional

import quantize
import quantize.files.threads
from quantize.files.threads import processors, thread_count
from quantize.methods.gptq import GptqParameters, solve
from quantize.methods.products import EvenProducts
from quantize.methods.sums import mean, total
from quantize.source.accelerator import settled

COUNTS = (1, 2, 3, 4, 8)
ONE = "  variants:\n    - {bits: 4, group_size: 32}\n"
# A process whose number of threads a compiled kernel would raise: OMP_NUM_THREADS says one, the machine has more.
AFTER_KERNEL = """
import torch
from quantize.methods.gptq import GptqParameters, solve

torch.set_num_threads(1)
inputs = torch.randn(400, 192, generator=torch.Generator().manual_seed(0))
for _ in range(2):
    solution, = solve(torch.ones(8, 192), inputs.t() @ inputs, [GptqParameters(4, 64)])
    print(torch.get_num_threads())
"""


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def _threads_stay() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- how many


@pytest.mark.parametrize(("said", "count"), [("3", 3), ("2,4", 2), (" 5 ", 5)])
def test_omp_num_threads_is_honoured(monkeypatch: pytest.MonkeyPatch, said: str, count: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert thread_count() == count


@pytest.mark.parametrize("said", ["", "0", "many", "-1", "1.5"])
def test_nonsense_in_the_environment_is_no_number(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert thread_count() == processors()


@pytest.mark.parametrize(
    ("membership", "files", "count"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/not/mounted\n", {"cpu.max": "300000 100000"}, 3),
        ("3:cpu,x:/a\n", {"cpu,x/a/cpu.cfs_quota_us": "50000", "cpu,x/a/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/a\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("4:memory:/a\n", {"memory/a/cpu.max": "100000 100000"}, 8),
        ("0::/a\n", {"a/cpu.max": "damaged"}, 8),
    ],
)  # fmt: skip
def test_a_containers_quota_is_honoured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, membership: str, files: dict[str, str], count: int
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "self").write_text(membership)
    monkeypatch.setattr(quantize.files.threads, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(quantize.files.threads, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert processors() == count


def test_the_affinity_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert processors() == 1


# -- set once


def test_a_kernel_leaves_torchs_threads_alone() -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AFTER_KERNEL], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]


def test_a_build_gives_back_what_the_caller_had(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    recipe = quantize.load_recipe(write_recipe(tmp_path / "r.yaml", tiny_llama, ONE, samples=2))

    def state() -> tuple[object, ...]:
        return (
            dict(os.environ), torch.get_num_threads(), numba.get_num_threads(), numba.config.CACHE_DIR,
            torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.is_autocast_enabled("cpu"),
            torch.utils.deterministic.fill_uninitialized_memory, torch.get_rng_state().tolist(),
        )  # fmt: skip

    quantize.build(recipe, quantize.BuildOptions(dist=tmp_path / "plain", device="cpu"))
    try:
        torch.set_num_threads(3)
        numba.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = state()
            quantize.build(recipe, quantize.BuildOptions(dist=tmp_path / "odd", device="cpu"))
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    # and none of it reached the bytes; the manifest says how many threads there were
    assert weights(tmp_path / "odd") == weights(tmp_path / "plain")


def test_a_failed_build_gives_it_back_too(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    recipe = write_recipe(tmp_path / "r.yaml", tiny_llama, ONE, samples=2, dataset="short.txt")
    (tmp_path / "short.txt").write_text("Too short.")
    torch.set_num_threads(1)
    before = dict(os.environ)
    with pytest.raises(quantize.errors.CalibrationError):
        quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path / "dist", device="cpu"))
    assert (dict(os.environ), torch.get_num_threads()) == (before, 1)


# -- the same bytes


def weights(dist: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(dist).items() if name.endswith((".safetensors", ".gguf"))}


def test_threads_change_no_byte_of_a_release_and_stand_in_its_manifests(tmp_path: Path, run_quantize: Command) -> None:
    # widths that fill no tile, windows of an odd length, and experts that see few tokens
    source = write_model(tmp_path / "model", "qwen2_moe", hidden_size=224, moe_intermediate_size=96)
    recipe = write_recipe(tmp_path / "r.yaml", source, EVERY_WAY.replace("64", "-1").replace("32", "-1"), samples=3,
                          sequence_length=37)  # fmt: skip
    found = {}
    for count in (1, 2):
        dist = tmp_path / str(count)
        built = run_quantize("build", recipe, "--dist", dist, "--device", "cpu", env={"OMP_NUM_THREADS": str(count)})
        assert built.returncode == 0, built.stderr
        found[count] = weights(dist)
        for path in dist.glob("*/*/quantize-manifest.json"):
            compute = json.loads(path.read_text())["compute"]
            assert compute["threads"] == count
            assert compute["dtype"] == "float32"
            assert compute["processor"]
    assert len(found[1]) == 3
    assert found[1] == found[2]


@pytest.mark.parametrize("operation", [
    pytest.param(lambda: functional.linear(random(9, 368), random(640, 368)), id="few rows"),
    pytest.param(lambda: functional.linear(random(3, 37, 200), random(145, 200), random(145)), id="odd sides, bias"),
    pytest.param(lambda: random(5, 100).t() @ random(5, 100), id="inputs of few tokens"),
    pytest.param(lambda: random(9, 77).addmm_(random(9, 300), random(300, 77), alpha=-1), id="in place"),
    pytest.param(lambda: torch.einsum("bld,bmd->blm", random(4, 99, 64), random(4, 101, 64)), id="attention"),
    pytest.param(lambda: torch.baddbmm(random(4, 9, 51), random(4, 9, 64), random(4, 64, 51), beta=0.5), id="batched"),
])  # fmt: skip
def test_products_do_not_depend_on_threads(operation: Callable[[], torch.Tensor]) -> None:
    plain, found = operation(), []
    for count in COUNTS:
        torch.set_num_threads(count)
        for mode in (contextlib.nullcontext(), torch.inference_mode()):
            with EvenProducts(), mode:
                found.append(operation().clone())
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], plain, rtol=1e-4, atol=1e-4)
    assert found[0].is_contiguous() == plain.is_contiguous()


@pytest.mark.parametrize("columns", [64, 100, 192, 200, 576, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solves_do_not_depend_on_threads(columns: int, dtype: torch.dtype) -> None:
    inputs, weight = random(2 * columns, columns).to(dtype), random(33, columns).to(dtype)
    hessian, found = inputs.t() @ inputs, []
    for count in COUNTS if dtype == torch.float32 else (1,):
        torch.set_num_threads(count)
        with settled(count):
            solution = solve(weight, hessian, [GptqParameters(4, -1, desc_act=True)])[0]
        found.append((solution.codes, solution.scales, solution.row_error))
    for other in found:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_sums_do_not_depend_on_threads() -> None:
    values, sums = random(1_000_003), set()
    for count in COUNTS:
        torch.set_num_threads(count)
        sums.add((total(values), mean(values)))
    assert len(sums) == 1
    assert total(values) == pytest.approx(float(values.double().sum()), abs=1e-6)
    assert total(torch.zeros(0)) == 0


# -- fresh, and what it does not cover


@pytest.fixture(scope="module")
def otherwise(tiny_llama: Path, invoke: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A branch that was computed in two shards by another torch, and its recipe."""
    folder = tmp_path_factory.mktemp("otherwise")
    recipe = write_recipe(folder / "r.yaml", tiny_llama, ONE, samples=2)
    built = invoke("build", recipe, "--dist", folder / "dist", "--device", "cpu", "--shards", 2)
    assert built.returncode == 0, built.stderr
    path = next((folder / "dist").glob("*/main/quantize-manifest.json"))
    data = json.loads(path.read_text())
    data["versions"]["torch"] = "1.0"
    data["compute"]["threads"] += 1
    path.write_text(json.dumps(data))
    return recipe, folder / "dist"


def test_a_plan_says_what_fresh_does_not_cover(otherwise: tuple[Path, Path], invoke: Command) -> None:
    recipe, dist = otherwise
    shown = invoke("plan", recipe, "--dist", dist, "--check")
    assert shown.returncode == 0, shown.stderr
    assert "nothing to build" in shown.stdout
    for command in ("plan", "status", "explain"):
        shown = invoke(command, recipe, "--dist", dist)
        assert "shards: 2 then, 1 here" in shown.stdout
        assert f"torch: 1.0 then, {torch.__version__.partition('+')[0]}" in shown.stdout
        assert "threads" not in shown.stdout  # of float32, no byte depends on them
    lines = json.loads(invoke("plan", recipe, "--dist", dist, "--json").stdout)["variants"][0]["made_otherwise"]
    assert len(lines) == 2
    assert not json.loads(invoke("plan", recipe, "--dist", dist, "--shards", 2, "--json").stdout)["variants"][0][
        "made_otherwise"
    ][0].startswith("shards")


def test_a_rebuild_says_what_was_otherwise(otherwise: tuple[Path, Path], tiny_llama: Path, invoke: Command) -> None:
    _, dist = otherwise
    done = invoke("rebuild", dist, "--source", tiny_llama, "--device", "cpu")
    assert "torch: 1.0 then" in done.stdout
    threads = torch.get_num_threads()
    assert "note   threads:" in done.stdout
    assert "OMP_NUM_THREADS=" in done.stdout
    assert threads == torch.get_num_threads()


def test_auto_is_float32_on_every_cpu_and_the_recipes_words_are_in_the_key(
    tiny_llama: Path, invoke: Command, tmp_path: Path
) -> None:
    recipe, dist = write_recipe(tmp_path / "r.yaml", tiny_llama, ONE, samples=2), tmp_path / "dist"
    assert invoke("build", recipe, "--dist", dist, "--device", "cpu").returncode == 0
    manifest = json.loads(next(dist.glob("*/main/quantize-manifest.json")).read_text())
    assert manifest["compute"]["dtype"] == "float32"
    for change in ("compute_dtype=bfloat16", "batch_tokens=64"):
        shown = invoke("plan", recipe, "--dist", dist, "--set", f"calibration.{change}")
        assert f"changed: calibration.{change.partition('=')[0]}" in shown.stdout
