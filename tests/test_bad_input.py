"""Bad input and bad luck: one clear error, the right exit code, and finished branches as they were."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcome import assert_refused, contents
from safetensors.torch import load_file, save_file

from quantize.errors import SolveError
from quantize.executors import local as workers
from quantize.methods.gptq import GptqParameters, solve

Command = Callable[..., subprocess.CompletedProcess[str]]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
BIG = ["--set", "calibration.samples=256"]  # long enough to be interrupted in the middle


# -- a source that is no good


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return lambda folder: edit_tensors(folder, change)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def misshape(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=400)


def only_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def text_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD_MODELS = {
    "nan-linear": (poison(DOWN, float("nan")), ["model.safetensors", DOWN, "NaN or infinity"]),
    "nan-norm": (poison("model.norm.weight", float("nan")), ["model.norm.weight", "NaN or infinity"]),
    "infinity": (poison("model.embed_tokens.weight", float("inf")), ["embed_tokens", "NaN or infinity"]),
    "tensor-lacking": (without(DOWN), ["lacks the tensor", DOWN]),
    "norm-lacking": (without("model.norm.weight"), ["lacks the tensor", "model.norm.weight"]),
    "wrong-shape": (misshape, ["model.embed_tokens.weight", "[384, 128]", "[400, 128]"]),
    "not-safetensors": (garbage, ["model.safetensors", "is truncated or damaged", "download the model again"]),
    "no-weights": (remove("model.safetensors"), ["contains no .safetensors weights"]),
    "only-pickle": (only_pickle, ["pytorch_model.bin", "only as pickle", "convert it to safetensors"]),
    "no-config": (remove("config.json"), ["has no config.json"]),
    "config-not-json": (text_config("{"), ["config.json", "is not readable JSON"]),
    "config-a-list": (text_config("[]"), ["config.json", "names no model_type"]),
    "no-model-type": (config(model_type=None), ["config.json", "names no model_type"]),
    "unknown-architecture": (config(model_type="florp"), ["cannot build the architecture 'florp'"]),
    "no-language-model": (config(model_type="vit"), ["no class that generates text for 'vit'"]),
    "wrong-block-count": (config(num_hidden_layers=4), ["lacks the tensor model.layers.3."]),
    "quantized": (config(quantization_config={"quant_method": "awq"}), ["already quantized (awq)"]),
    "quantized-oddly": (config(quantization_config="yes"), ["already quantized"]),
    "no-tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["its tokenizer cannot be read"]),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_refused(
    invoke: Command, tiny_recipe: Path, tiny_llama: Path, dist: Path, tmp_path: Path, name: str
) -> None:
    damage, words = BAD_MODELS[name]
    model = Path(shutil.copytree(tiny_llama, tmp_path / "tiny-llama"))
    damage(model)
    # the release of its sound twin, which lies in a folder of the same name, would be refused for that alone
    options = ["--set", f"model.source={model}", "--set", "release.repo=local/damaged-{METHOD}"]
    assert_build_refused(invoke, tiny_recipe, dist, options, words)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def point_index_to(shard: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map={**table, next(iter(table)): shard})

    return change


BAD_SHARDS = {
    "missing": (remove(SHARDS[1]), [SHARDS[1], "shard is missing"]),
    "truncated": (cut(SHARDS[1]), [SHARDS[1], "is truncated or damaged"]),
    "empty": (lambda folder: os.truncate(folder / SHARDS[0], 0), [SHARDS[0], "is truncated or damaged"]),
    "twice": (lambda folder: shutil.copy(folder / SHARDS[0], folder / SHARDS[1]), ["is in both", *SHARDS]),
    "index-not-json": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "is not a safetensors index"]),
    "index-without-map": (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "is not a safetensors index"]),
    "index-outside": (point_index_to("../secret.safetensors"), [INDEX, "'../secret.safetensors'", "outside"]),
    "index-absolute": (point_index_to("/etc/passwd"), [INDEX, "'/etc/passwd'", "outside"]),
    "index-disagrees": (point_index_to(SHARDS[1]), [INDEX, "says that", SHARDS[1], "but it is not"]),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_are_refused(
    invoke: Command, tiny_recipe: Path, sharded_llama: Path, dist: Path, tmp_path: Path, name: str
) -> None:
    damage, words = BAD_SHARDS[name]
    model = Path(shutil.copytree(sharded_llama, tmp_path / "tiny-llama"))
    damage(model)
    before = contents(dist)
    assert_refused(invoke("plan", tiny_recipe, "--dist", dist, "--set", f"model.source={model}"), *words)
    assert contents(dist) == before
    assert_build_refused(invoke, tiny_recipe, dist, ["--set", f"model.source={model}"], words)


def test_a_finished_branch_is_no_source(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    branch = dist / "tiny-llama-GPTQ" / "main"
    assert_build_refused(
        invoke, tiny_recipe, dist, ["--set", f"model.source={branch}"], ["already quantized (gptq)", branch]
    )


# -- a recipe that does not fit, a text that is no good


BAD_FITS = {
    "group-size": (
        ["gptq.variants.1={bits: 4, group_size: 256}"],
        ["branch gptq-4bit-256g", "group_size 256", "128 inputs of model.layers.0.", "use 128, 64, 32, 16 or -1"],
    ),
    "too-long": (["calibration.sequence_length=512"], ["calibration.sequence_length: 512", "at most 256"]),
    "no-source": (["model.source=./nowhere"], ["nowhere: no such directory", "hub id"]),
    "no-package": (["model.source=package:no-such-package-here"], ["no-such-package-here is not installed"]),
    "no-text": (["calibration.dataset=./nothing.txt"], ["nothing.txt: the calibration file does not exist"]),
    "short-text": (["calibration.dataset=./short.txt"], ["short.txt gives", "fewer than one window of 64"]),
    "empty-text": (["calibration.dataset=./empty.txt"], ["empty.txt gives 0 tokens"]),
    "binary-text": (["calibration.dataset=./binary.txt"], ["binary.txt: is not UTF-8 text (byte 1)"]),
    "not-jsonl": (["calibration.dataset=./broken.jsonl"], ["broken.jsonl:2: is not JSON"]),
    "no-column": (["calibration.dataset={file: ./rows.jsonl, column: body}"], ["rows.jsonl:1", "column 'body'"]),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_a_recipe_that_does_not_fit_is_refused(
    invoke: Command, tiny_recipe: Path, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Too short.")
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"a\xff\xfe")
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("rows.jsonl").write_text('{"text": "fine"}\n')
    overrides, words = BAD_FITS[name]
    assert_build_refused(invoke, tiny_recipe, dist, [f"--set={override}" for override in overrides], words)


def test_an_impossible_group_size_is_refused_by_plan_already(
    invoke: Command, tiny_llama: Path, dist: Path, tmp_path: Path
) -> None:
    from tiny import write_recipe

    recipe = write_recipe(tmp_path / "r.yaml", tiny_llama, "  variants:\n    - {bits: 4, group_size: 512}\n")
    for command in ("plan", "build", "explain", "status"):
        result = invoke(command, recipe, "--dist", dist)
        assert_refused(result, "r.yaml:8: gptq.variants[0]: branch main: group_size 512")


def assert_build_refused(
    invoke: Command, recipe: Path, dist: Path, options: list[str], words: list[object], *, code: int = 2
) -> None:
    before = contents(dist)
    assert_refused(invoke("build", recipe, "--dist", dist, "--device", "cpu", *options), *words, code=code)
    assert contents(dist) == before


# -- the real command says it the same way


def test_the_real_command_gives_one_line_and_no_traceback(run_quantize: Command, tmp_path: Path) -> None:
    result = run_quantize("build", "no-such-recipe.yaml", cwd=tmp_path)
    assert_refused(result, "no-such-recipe.yaml: no such recipe file")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


# -- the machine fails


def test_too_little_space_is_refused_before_any_work(
    invoke: Command, tiny_recipe: Path, dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_build_refused(invoke, tiny_recipe, dist, [], ["only 0.00 GB are free", "--only"], code=1)


def test_a_disk_that_fills_up_leaves_nothing_half_written(run_quantize: Command, tiny_recipe: Path, dist: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    before = contents(dist)
    result = run_quantize("build", tiny_recipe, "--dist", dist, "--device", "cpu", preexec_fn=limit)
    assert_refused(result, dist, "no space left", "File too large", code=1)
    assert contents(dist) == before


def test_a_second_build_in_the_same_dist_is_refused(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    with (dist / ".quantize" / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_build_refused(invoke, tiny_recipe, dist, [], [dist, "another build is running in it"], code=1)
        assert invoke("plan", tiny_recipe, "--dist", dist).returncode == 0
    assert invoke("build", tiny_recipe, "--dist", dist, "--only", "main").returncode == 0


def start_build(recipe: Path, dist: Path) -> subprocess.Popen[str]:
    """A build of ``eight`` in a process of its own, which has begun to write when this returns."""
    command = [sys.executable, "-m", "quantize", "build", str(recipe), "--dist", str(dist), "--device", "cpu", *BIG]
    process = subprocess.Popen(
        [*command, "--only", "eight"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        if any(dist.rglob("eight/*.safetensors")):
            break
        time.sleep(0.01)
    return process


def test_ctrl_c_is_130_and_leaves_nothing_behind(tiny_recipe: Path, dist: Path) -> None:
    before = contents(dist)
    process = start_build(tiny_recipe, dist)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; finished branches are untouched"
    assert "Traceback" not in err
    assert out == ""
    assert contents(dist) == before


def test_a_killed_build_is_made_up_for_by_the_next(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    repo = dist / "tiny-llama-GPTQ"
    before = contents(repo)
    process = start_build(tiny_recipe, dist)
    process.kill()
    process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL
    assert any(dist.rglob("eight/*.safetensors")), "killed too late: nothing unfinished was left"
    assert contents(repo) == before

    built = invoke("build", tiny_recipe, "--dist", dist, "--only", "eight", "--device", "cpu")
    assert built.returncode == 0, built.stderr
    assert sorted(path.name for path in repo.iterdir()) == ["eight", "main"]
    assert sorted(path.name for path in (dist / ".quantize").iterdir()) == ["lock", "origins.json"]
    assert invoke("plan", tiny_recipe, "--dist", dist, "--check").returncode == 0


def test_a_branch_lost_between_two_renames_comes_back(invoke: Command, tiny_recipe: Path, dist: Path) -> None:
    branch = dist / "tiny-llama-GPTQ" / "main"
    before = contents(branch)
    aside = dist / ".quantize" / "replaced" / "tiny-llama-GPTQ" / "main"
    aside.parent.mkdir(parents=True)
    branch.rename(aside)
    assert invoke("build", tiny_recipe, "--dist", dist, "--only", "main").returncode == 0
    assert contents(branch) == before
    assert sorted(path.name for path in (dist / ".quantize").iterdir()) == ["lock", "origins.json"]


# -- a Hessian that is not positive definite


def indefinite(size: int, coupling: float) -> torch.Tensor:
    """The identity but for one pair of channels; its least eigenvalue is ``1 - coupling``."""
    hessian = torch.eye(size)
    hessian[0, 1] = hessian[1, 0] = coupling
    return hessian


def test_solve_raises_the_damping_until_it_is_enough() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    wish = [GptqParameters(4, 32, damp_percent=0.1)]
    good, bad = (solve(weight, indefinite(64, coupling), wish, kernel="torch")[0] for coupling in (0.5, 1.5))
    assert (good.damp_raised, good.damp_percent) == (False, 0.1)
    assert (bad.damp_raised, bad.damp_percent) == (True, pytest.approx(1.0))
    assert float((bad.dequantize() - weight).abs().max()) < 0.5


def test_solve_gives_up_or_rounds_where_no_damping_helps() -> None:
    weight, hessian, wish = torch.ones(4, 32), indefinite(32, 1e4), [GptqParameters(4, 32)]
    with pytest.raises(SolveError, match="not positive definite even with damp_percent"):
        solve(weight, hessian, wish)
    assert solve(weight, hessian, wish, rtn_fallback=True)[0].fallback == "rtn"


@pytest.fixture
def broken_statistics(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``broken_statistics(coupling)``: MLP output projections of 256 inputs get an indefinite Hessian."""

    def arrange(coupling: float) -> None:
        def wrapped(weight: torch.Tensor, hessian: torch.Tensor, *rest: Any, **options: Any) -> object:
            return solve(weight, indefinite(256, coupling) if hessian.shape[0] == 256 else hessian, *rest, **options)

        monkeypatch.setattr(workers, "solve", wrapped)

    return arrange


def test_the_ledger_says_where_damping_was_raised(
    invoke: Command, tiny_recipe: Path, tmp_path: Path, broken_statistics: Callable[[float], None]
) -> None:
    broken_statistics(1.5)
    dist = tmp_path / "dist"
    result = invoke("build", tiny_recipe, "--dist", dist, "--only", "main", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    ledger = json.loads((dist / "tiny-llama-GPTQ" / "main" / "quantize-manifest.json").read_text())["ledger"]
    raised = {entry["module"]: entry["damp_percent"] for entry in ledger if entry["outcome"] == "damp_raised"}
    assert raised == {f"model.layers.{index}.mlp.down_proj": 1.0 for index in range(3)}
    assert {entry["damp_percent"] for entry in ledger if entry["outcome"] == "solved"} == {0.1}
    assert "note   gptq/main: damp_raised in model.layers.0.mlp.down_proj" in result.stdout


@pytest.mark.parametrize(
    ("coupling", "override", "words"),
    [
        (1.5, "gptq.fail_on=[damp_raised]", ["down_proj: damp_raised", "gptq.fail_on"]),
        (1e4, "gptq.fail_on=[]", ["down_proj: ", "not positive definite", "gptq.rtn_fallback"]),
        (float("nan"), "gptq.fail_on=[]", ["down_proj: "]),
    ],
    ids=["fail-on", "hopeless", "nan"],
)
def test_what_cannot_be_solved_names_its_module(
    invoke: Command,
    tiny_recipe: Path,
    dist: Path,
    broken_statistics: Callable[[float], None],
    coupling: float,
    override: str,
    words: list[object],
) -> None:
    broken_statistics(coupling)
    assert_build_refused(invoke, tiny_recipe, dist, ["--set", override], ["model.layers.0.mlp.", *words], code=1)
