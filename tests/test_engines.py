"""Other engines behind the same recipe: the door itself with a fake engine, and real ones where they are installed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from fake_engine import ENGINE
from safetensors.torch import load_file
from tiny import write_model, write_recipe

import quantize
from quantize import engines
from quantize.engines import Engine, installers, known_engines
from quantize.engines.environment import MARK, Environment
from quantize.engines.installers import Pip, find_installer
from quantize.engines.process import WORKER
from quantize.errors import EngineError
from quantize.files.child import MAIN
from quantize.formats import compressed
from quantize.formats.packing import pack
from quantize.formats.reader import BranchReader
from quantize.planning.engines import environment_of
from quantize.reporter import SILENT

FAKE = Path(__file__).with_name("fake_engine.py")
BODY = """\
  group_size: 32
  bits: 8
  variants:
    - {branch: main}
    - {branch: theirs, engine: fake}
"""
THEIRS = "  variants: [{branch: theirs, bits: 8, group_size: 32, engine: fake}]\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which nothing is installed, and the fake engine among the known ones."""
    folder = tmp_path_factory.mktemp("engines-cache")
    known = {**known_engines(), "fake": Engine(**ENGINE, file=FAKE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTIZE_CACHE", str(folder))
        patch.setattr(engines, "known_engines", lambda: known)
        yield folder


@pytest.fixture
def empty(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def fake(cache: Path) -> Environment:
    """The fake engine, at home in the tests' own Python."""
    environment = environment_of(engines.find_engine("fake"))
    environment.adopt(Path(sys.executable), SILENT)
    return environment


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, cache: Path) -> Path:
    return write_recipe(cache / "mixed.yaml", tiny_llama, BODY, samples=2, compute_dtype="float32")


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path, cache: Path) -> Path:
    return write_recipe(cache / "theirs.yaml", tiny_llama, THEIRS, samples=2)


@pytest.fixture(scope="module")
def built(recipe: Path, fake: Environment, cache: Path) -> Path:
    """The folder of a native branch, ``main``, and the fake engine's, ``theirs``."""
    quantize.build(quantize.load_recipe(recipe), quantize.BuildOptions(dist=cache / "dist", device="cpu"))
    return cache / "dist" / "tiny-llama-GPTQ"


# -- what the engines' files say


@pytest.mark.parametrize("name", known_engines())
def test_every_engine_pins_what_it_asks_for(name: str) -> None:
    engine = known_engines()[name]
    pins = dict(pin.lower().replace("_", "-").split("==") for pin in engine.constraints.split())
    asked = [re.split(r"[<>=!~]", word)[0].lower() for word in engine.requirements]
    assert set(asked) <= set(pins)
    exact = dict(word.split("==") for word in (*engine.requirements, *engine.without_dependencies) if "==" in word)
    assert exact[engine.package] == engine.version
    assert not any(word.startswith(("nvidia-cu", "triton")) for word in pins)


def test_what_runs_in_an_engines_environment_imports_nothing_of_ours() -> None:
    for path in [MAIN, WORKER, *WORKER.parent.glob("tools/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in imported if name.partition(".")[0] == "quantize"], path
        on_top = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        on_top += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert {name.partition(".")[0] for name in on_top} <= sys.stdlib_module_names, path


# -- recipes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{engine: gptqmodl}", "gptq.variants[0].engine: must be one of native, "),
        ("{engine: gptqmodl}", "did you mean 'gptqmodel'?"),
        ("{engine: autoawq}", "gptq.variants[0].engine: autoawq 0.2.9 does not support GPTQ here, only AWQ"),
        (
            "{engine: auto-round, desc_act: true}",
            "gptq.variants[0].desc_act: auto-round 0.16.1 supports only false, ",
        ),
        (
            "{engine: llm-compressor, bits: 3}",
            "gptq.variants[0].bits: llm-compressor 0.14.0.1 supports only 4, 8, not 3",
        ),
        ("{engine: gptqmodel, propagate: source}", "it always calibrates on its own quantized activations"),
        ("{engine: fake, bits: 4}", "gptq.variants[0].bits: fake 1.0 supports only 8, not 4 (it is a fake)"),
    ],
)
def test_what_an_engine_cannot_do_is_an_error_at_its_place(
    cache: Path, tiny_llama: Path, tmp_path: Path, invoke: Command, body: str, message: str
) -> None:
    path = write_recipe(tmp_path / "r.yaml", tiny_llama, f"  variants:\n    - {body}\n")
    result = invoke("validate", path)
    assert result.returncode == 2
    assert "r.yaml:8: " in result.stderr
    assert message in result.stderr


def test_settings_of_the_section_are_held_against_the_engine_too(theirs: Path, tmp_path: Path, invoke: Command) -> None:
    refused = invoke("validate", theirs, "--set", "gptq.mse=true")
    assert "gptq.mse: fake 1.0 supports only false, not true" in refused.stderr
    refused = invoke("validate", theirs, "--set", "gptq.fail_on=[dead_columns]")
    assert "gptq.fail_on: fake 1.0 does not report what to fail on" in refused.stderr


def test_what_the_recipe_leaves_open_is_as_the_engine_has_it(cache: Path, tiny_llama: Path, tmp_path: Path) -> None:
    body = "  matrix: {bits: [4, 8], engine: [native, gptqmodel]}\n"
    variants = quantize.load_recipe(write_recipe(tmp_path / "r.yaml", tiny_llama, body)).recipe.gptq.variants
    by_name = {variant.branch: (variant.engine, variant.mse, variant.propagate) for variant in variants}
    ours, their = ("native", True, "auto"), ("gptqmodel", False, "quantized")
    assert by_name == {
        "main": ours,
        "gptq-4bit-128g-actorder_False-gptqmodel": their,
        "gptq-8bit-128g-actorder_False": ours,
        "gptq-8bit-128g-actorder_False-gptqmodel": their,
    }


def test_keys_of_our_own_branches_know_no_engine(recipe: Path) -> None:
    plan = quantize.plan(quantize.load_recipe(recipe))
    ours, their = (plan.key_inputs(item) for item in plan.variants)
    assert set(ours) == {"solver", "statistics", "source", "calibration", "parameters", "method", "max_shard_size"}
    assert "engine" not in ours["parameters"]
    assert set(their) == set(ours) - {"solver", "statistics"} | {"engine"}
    assert their["engine"]["name"] == "fake"


# -- environments


def write_wheel(folder: Path) -> None:
    """The smallest wheel that pip takes."""
    about = "quantize_fake_tool-1.0.dist-info"
    files = {
        "quantize_fake_tool.py": "",
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: quantize-fake-tool\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / "quantize_fake_tool-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all that pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_an_environment_is_made_once_and_kept(
    empty: Path, offline: Path, tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("pip", "ensurepip", "venv"):  # a stranger's checkout
        (tmp_path / "theirs" / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path / "theirs")
    refused = invoke("engines", "install", "fake")
    assert refused.returncode == 1
    assert "fake 1.0: pip cannot install it: " in refused.stderr
    assert refused.stderr.count("error:") == 1
    assert "not installed" in line_of(invoke("engines", "list").stdout, "fake")

    write_wheel(offline)
    assert invoke("engines", "install", "fake").returncode == 0
    environment = environment_of(engines.find_engine("fake"))
    module = list(environment.folder.rglob("quantize_fake_tool.py"))
    assert len(module) == 1
    assert str(environment.python).startswith(str(empty))

    made = module[0].stat().st_mtime_ns
    assert not (tmp_path / "marker").exists()
    assert "is already installed" in invoke("engines", "install", "fake").stderr
    assert module[0].stat().st_mtime_ns == made
    assert " installed" in line_of(invoke("engines", "list").stdout, "fake")


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_an_interrupted_installation_is_not_taken_for_a_finished_one(
    empty: Path, monkeypatch: pytest.MonkeyPatch, invoke: Command
) -> None:
    def interrupted(self: Pip, python: Path, wanted: list[str], log: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantize.engines.environment.find_installer", Pip)
    monkeypatch.setattr(Pip, "create", lambda self, folder, log: Path(sys.executable))
    monkeypatch.setattr(Pip, "install", interrupted)
    assert invoke("engines", "install", "fake").returncode == 130
    environment = environment_of(engines.find_engine("fake"))
    assert environment.folder.is_dir()
    assert environment.mark is None
    with pytest.raises(EngineError, match="is not installed; run `quantize engines install fake`"):
        _ = environment.python

    rubbish = environment.folder / "half"
    rubbish.touch()
    monkeypatch.setattr(Pip, "install", lambda self, python, wanted, log: True)
    environment.install(SILENT)
    assert not rubbish.exists()
    assert (environment.folder / MARK).is_file()


def test_a_machine_without_network_gets_one_sentence(empty: Path, offline: Path, invoke: Command) -> None:
    log = "Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution found\n"
    environment = environment_of(engines.find_engine("fake"))
    environment.folder.mkdir(parents=True)
    (environment.folder / "install.log").write_text(log)
    from quantize.engines.installers import reason

    assert reason(environment.folder / "install.log") == "the package index cannot be reached"


UV = """\
#!{python}
import os, pathlib, sys
words = sys.argv[1:]
with open({calls!r}, "a") as log:
    print(os.getcwd(), *words, file=log)
if words[0] == "venv":
    bin = pathlib.Path(words[-1]) / "bin"
    bin.mkdir(parents=True)
    (bin / "python").symlink_to({python!r})
else:
    print({says!r}, file=sys.stderr)
    sys.exit(bool({says!r}))
"""


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a uv that installs nothing on the PATH, or one that fails with what it is to say; the file of its calls.
    Nothing tells pip where packages come from."""

    def put(says: str = "") -> Path:
        folder = tmp_path / "programs"
        folder.mkdir()
        text = UV.format(python=sys.executable, calls=str(folder / "calls"), says=says)
        (folder / "uv").write_text(text)
        (folder / "uv").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder / "calls"

    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return put


def test_uv_makes_the_environment_where_it_is_there(
    empty: Path, uv: Callable[[str], Path], tmp_path: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = uv("")
    monkeypatch.chdir(tmp_path)  # whose uv.toml, if it has one, says nothing here
    monkeypatch.setenv("QUANTIZE_CACHE", "cache")
    result = invoke("engines", "install", "fake")
    assert result.returncode == 0, result.stderr
    environment = environment_of(engines.find_engine("fake"))
    assert environment.python == (environment.folder / "python" / "bin" / "python").absolute()
    constraints = (environment.folder / "constraints.txt").absolute()
    assert constraints.read_text() == "quantize-fake-tool==1.0\n"
    folder = environment.folder.absolute() / "python"
    python = folder / "bin" / "python"
    assert calls.read_text().splitlines() == [
        f"/ venv --no-project --python {sys.executable} {folder}",
        f"/ pip install --python {python} --constraint {constraints} quantize-fake-tool==1.0",
    ]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (
            "  × No solution found when resolving dependencies:\n  ╰─▶ Because fake-tool was not found, it is so.\n",
            "No solution found when resolving dependencies: Because fake-tool was not found, it is so.",
        ),
        ("error: Failed to fetch: `x`\n  Caused by: dns error: no such name\n", "the package index cannot be reached"),
        ("error: disk full\n", "disk full"),
    ],
)
def test_uv_that_fails_is_one_sentence(
    says: str, reason: str, empty: Path, uv: Callable[[str], Path], invoke: Command
) -> None:
    uv(says)
    refused = invoke("engines", "install", "fake")
    assert refused.returncode == 1
    assert f"error: fake 1.0: uv cannot install it: {reason}; see " in refused.stderr
    assert refused.stderr.count("error:") == 1
    assert environment_of(engines.find_engine("fake")).mark is None


@pytest.mark.parametrize("told", ["variable", "file", "file of another thing", "both"])
def test_what_tells_pip_alone_where_packages_are_is_not_passed_over(
    told: str, uv: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv("")
    lines = {"file": "[global]\nindex-url = https://example.org/simple\n", "file of another thing": "timeout = 5\n"}
    (tmp_path / "pip.conf").write_text(lines.get(told, ""))
    if told in lines:
        monkeypatch.setattr(installers, "_pip_files", lambda: [tmp_path / "absent", tmp_path / "pip.conf"])
    else:
        monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    if told == "both":
        monkeypatch.setenv("UV_DEFAULT_INDEX", "https://example.org/simple")
    assert find_installer().name == ("pip" if told in {"variable", "file"} else "uv")


def test_a_python_that_brings_no_pip_is_told_what_to_do(
    empty: Path, offline: Path, invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(folder: Path, **options: Any) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").write_text("#!/bin/sh\necho No module named ensurepip\nexit 1\n")
        (folder / "bin" / "python").chmod(0o755)

    monkeypatch.setattr("quantize.engines.installers.venv.create", create)
    refused = invoke("engines", "install", "fake")
    assert refused.returncode == 1
    for words in ("install uv", "python3-venv", "quantize engines install fake --python PATH"):
        assert words in refused.stderr
    assert refused.stderr.count("error:") == 1


def test_other_pins_are_another_environment(empty: Path) -> None:
    engine = engines.find_engine("fake")
    other = engine.model_copy(update={"constraints": "quantize-fake-tool==1.1"})
    assert environment_of(engine).folder != environment_of(other).folder
    assert environment_of(engine).identity != environment_of(other).identity


def test_check_tells_what_it_sees(fake: Environment, empty: Path, cache: Path, invoke: Command) -> None:
    missing = invoke("engines", "check", "fake")
    assert missing.returncode == 3
    assert "GPTQ: fake 1.0 is not installed; run `quantize engines install fake`" in missing.stdout
    taken = invoke("engines", "install", "fake", "--python", sys.executable)
    assert taken.returncode == 0, taken.stderr
    found = invoke("engines", "check", "fake")
    assert found.returncode == 0
    assert f"numpy {np.__version__}" in found.stdout
    assert "GPTQ: can run here" in found.stdout
    assert invoke("engines", "install", "fake", "--python", "/no/such").returncode == 2
    assert "the engines are auto-gptq, " in invoke("engines", "check", "nothing").stderr


def test_a_machine_without_a_gpu_is_told_so_before_any_work(
    empty: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Command
) -> None:
    monkeypatch.setattr("quantize.engines.environment.has_gpu", lambda: False)
    checked = invoke("engines", "check", "auto-gptq")
    assert checked.returncode == 3
    assert "needs an NVIDIA GPU with CUDA, and this machine has none" in checked.stdout
    path = write_recipe(tmp_path / "r.yaml", tiny_llama, "  variants: [{engine: auto-gptq, group_size: 32}]\n")
    planned = invoke("plan", path, "--dist", tmp_path / "dist")
    assert planned.returncode == 0
    assert "gptq/main cannot be built yet: auto-gptq 0.7.1 needs an NVIDIA GPU" in planned.stdout
    monkeypatch.setattr("quantize.engines.environment.has_gpu", lambda: True)
    assert "auto-gptq 0.7.1 is not installed" in invoke("plan", path, "--dist", tmp_path / "dist").stdout


def test_an_engine_that_is_not_installed_stops_a_build_before_it_starts(
    empty: Path, recipe: Path, tmp_path: Path, invoke: Command
) -> None:
    planned = invoke("plan", recipe, "--dist", tmp_path / "dist")
    assert "gptq/theirs cannot be built yet: fake 1.0 is not installed; run `quantize engines install fake`" in (
        planned.stdout
    )
    result = invoke("build", recipe, "--dist", tmp_path / "dist")
    assert result.returncode == 2
    assert "error: gptq/theirs: fake 1.0 is not installed; run `quantize engines install fake`\n" in result.stderr
    assert "calibrating" not in result.stderr
    assert not list((tmp_path / "dist").glob("*-GPTQ"))


# -- a branch by the fake engine


def test_the_branch_has_the_files_and_tensors_that_were_planned(built: Path, recipe: Path, tiny_llama: Path) -> None:
    ours, their = built / "main", built / "theirs"
    assert {path.name for path in ours.iterdir()} == {path.name for path in their.iterdir()}
    mine, found = (load_file(folder / "model.safetensors") for folder in (ours, their))
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {
        name: (t.shape, t.dtype) for name, t in found.items()
    }
    source = load_file(tiny_llama / "model.safetensors")
    for name in set(source) & set(found):
        assert torch.equal(source[name], found[name])
        assert source[name].dtype == found[name].dtype
    for name in {path.name for path in tiny_llama.iterdir()} - {"README.md", "config.json", "model.safetensors"}:
        assert (their / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_the_weights_are_the_engines(built: Path, tiny_llama: Path) -> None:
    reader, source = BranchReader(built / "theirs"), load_file(tiny_llama / "model.safetensors")
    ledger = json.loads((built / "theirs" / "quantize-manifest.json").read_text())["ledger"]
    assert len(ledger) == 21
    for row in ledger:
        weight = source[f"{row['module']}.weight"].float()
        groups = weight.view(len(weight), -1, 32)
        scale = (groups.abs().amax(dim=2) / 127).half().float()[..., None]
        nearest = (torch.round(groups / scale).clamp(-128, 127) * scale).view_as(weight)
        found = reader.weight(row["module"])
        assert torch.allclose(found, nearest, atol=1e-6)
        error = float((weight - found).square().sum() / weight.square().sum())
        assert row == {
            "module": row["module"], "outcome": "external", "damp_percent": 0.25,
            "weight_error": pytest.approx(error, rel=1e-4),
        }  # fmt: skip


def test_configs_and_manifest_say_who_made_it_and_nothing_of_the_machine(built: Path, cache: Path) -> None:
    config = json.loads((built / "theirs" / "config.json").read_text())
    own = json.loads((built / "theirs" / "quantize_config.json").read_text())
    assert config["quantization_config"] == own
    assert own["meta"]["quantizer"][0] == f"fake:{np.__version__}"
    assert set(own) == set(json.loads((built / "main" / "quantize_config.json").read_text()))
    manifest = json.loads((built / "theirs" / "quantize-manifest.json").read_text())
    assert manifest["engine"]["name"] == "fake"
    assert manifest["engine"]["packages"]["numpy"] == np.__version__
    assert manifest["compute"] == {"device": "cpu", "dtype": "float32"}
    assert "engine" not in json.loads((built / "main" / "quantize-manifest.json").read_text())
    for path in (built / "theirs").glob("*.json"):
        assert str(cache) not in path.read_text(), path


def test_the_card_names_the_engine(built: Path) -> None:
    card = (built / "theirs" / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| [theirs]"))
    assert f"| fake {np.__version__} |" in row
    assert f"| quantize {quantize.__version__} |" in next(li for li in card.splitlines() if li.startswith("| [main]"))
    assert f"The others were made by fake {np.__version__} from the same tokens." in card


def test_it_is_measured_verified_linted_and_shown_as_any_other(
    built: Path, recipe: Path, tiny_llama: Path, cache: Path, invoke: Command
) -> None:
    dist = built.parent
    verified = invoke("verify", built, "--source", tiny_llama, "--no-load", "--json")
    assert verified.returncode == 0, verified.stdout
    theirs, ours = (json.loads(invoke("lint", built / name, "--json").stdout) for name in ("theirs", "main"))
    assert findings(theirs) == findings(ours)
    state = json.loads(invoke("status", recipe, "--dist", dist, "--json").stdout)["branches"][1]
    assert (state["state"], state["modules"], state["oddities"]) == ("fresh", 21, {})
    assert invoke("report", recipe, "--dist", dist, "--out", cache / "report.html").returncode == 0


def findings(report: Any) -> list[str]:
    """The findings of a lint in JSON, without the branch's name."""
    return [json.dumps(found) for branch in report for found in branch["findings"]]


def test_two_builds_give_the_same_bytes_and_a_third_does_nothing(
    built: Path, recipe: Path, fake: Environment, tmp_path: Path
) -> None:
    again = quantize.build(
        quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path, only=("theirs",), device="cpu")
    )
    assert again.built == ["gptq/theirs"]
    for path in (tmp_path / "tiny-llama-GPTQ" / "theirs").iterdir():
        if path.name not in {"README.md", "quality.svg"}:
            assert digest(path) == digest(built / "theirs" / path.name), path.name
    third = quantize.build(
        quantize.load_recipe(recipe), quantize.BuildOptions(dist=tmp_path, only=("theirs",), device="cpu")
    )
    assert (third.built, third.fresh) == ([], ["gptq/theirs"])
    assert sorted(path.name for path in (tmp_path / ".quantize").iterdir()) == ["lock", "origins.json"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_manifest_of_an_engine_is_rebuilt_by_it(built: Path, tiny_llama: Path, invoke: Command) -> None:
    done = invoke("rebuild", built / "theirs", "--source", tiny_llama, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = json.loads(done.stdout)
    assert one["changed"] == []
    assert "model.safetensors" in one["equal"]


def test_another_environment_makes_a_branch_stale(
    built: Path, recipe: Path, fake: Environment, invoke: Command
) -> None:
    mark = fake.folder / MARK
    before = mark.read_text()
    mark.write_text(before.replace(f"numpy=={np.__version__}", "numpy==9.9"))
    try:
        told = invoke("explain", recipe, "--dist", built.parent, "--only", "theirs").stdout
    finally:
        mark.write_text(before)
    assert "gptq/theirs: stale, changed: engine.environment" in told


def test_the_recipes_checkpoint_format_and_zero_bias_are_kept(
    built: Path, theirs: Path, fake: Environment, tmp_path: Path, invoke: Command
) -> None:
    settings = ("--set", "gptq.checkpoint_format=gptq_v2", "--set", "gptq.zero_bias=true")
    assert invoke("build", theirs, "--dist", tmp_path, *settings).returncode == 0
    folder = tmp_path / "tiny-llama-GPTQ" / "theirs"
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    assert set(tensors[f"{module}.qzeros"].view(torch.uint8).unique().tolist()) == {0x80}
    assert not tensors[f"{module}.bias"].any()
    assert torch.equal(BranchReader(folder).weight(module), BranchReader(built / "theirs").weight(module))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("fails", "fake 1.0 failed: RuntimeError: out of"),
        ("killed", "fake 1.0 was killed by SIGKILL: the machine may have run out of memory"),
        ("silent", "fake 1.0 ended without an answer (exit code 3)"),
        ("a tensor is missing", "model.layers.1.mlp.up_proj.scales is missing"),
        ("a norm is changed", "model.layers.1.input_layernorm.weight is not the source's, though GPTQ leaves it alone"),
        ("NaN", "model.layers.1.mlp.up_proj.scales holds NaN or infinity"),
        ("far off", "model.layers.1.mlp.up_proj is off by "),
        ("another shape", "output of fake 1.0 rejected: "),
        ("hidden order", "model.layers.1.mlp.up_proj.g_idx is not in the natural order"),
        ("too much", "it quantized lm_head too"),
        ("no config", "it has no config.json with a quantization_config"),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_leaves_nothing(
    theirs: Path, fake: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Command,
    wrong: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_ENGINE", wrong)
    result = invoke("build", theirs, "--dist", tmp_path)
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert said[0].startswith("error: gptq/theirs: ")
    assert not list(tmp_path.glob("*-GPTQ"))
    assert [path.name for path in (tmp_path / ".quantize").iterdir()] == ["lock"]
    log = Path(re.search(r"its log is (\S+\.log)", result.stderr)[1])  # type: ignore[index]
    assert "the log of the fake engine" in log.read_text()


def test_what_was_finished_before_a_failure_stays(
    recipe: Path, fake: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Command
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "fails")
    assert invoke("build", recipe, "--dist", tmp_path).returncode == 1
    assert [path.name for path in (tmp_path / "tiny-llama-GPTQ").iterdir()] == ["main"]


# -- compressed-tensors


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized_is_decoded_as_its_source_says(bits: int, symmetric: bool) -> None:
    generator = np.random.default_rng(bits)
    rows, columns, size, half = 32, 64, 16, 2 ** (bits - 1)
    codes = generator.integers(-half, half, (rows, columns))
    scale = generator.uniform(0.01, 0.1, (rows, columns // size)).astype(np.float16)
    zero = np.zeros((rows, columns // size), int) if symmetric else generator.integers(-half, half, scale.shape)
    expected = np.zeros((rows, columns), np.float32)
    words = np.zeros((rows, columns * bits // 32), np.uint32)
    for row in range(rows):
        for column in range(columns):
            step = np.float32(scale[row, column // size])
            expected[row, column] = (codes[row, column] - zero[row, column // size]) * step
            word, shift = divmod(column * bits, 32)
            words[row, word] |= np.uint32((codes[row, column] + half) << shift)
    tensors = {
        "weight_packed": torch.from_numpy(words.view(np.int32)),
        "weight_scale": torch.from_numpy(scale),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(torch.from_numpy(zero + half), bits)
    torch.testing.assert_close(compressed.decode(tensors, bits), torch.from_numpy(expected))
    with pytest.raises(ValueError, match="weight_shape"):
        compressed.decode(tensors | {"weight_shape": torch.tensor([columns, rows])}, bits)


# -- real engines


@pytest.mark.loader
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed in the tests' environment")
def test_gptqmodel_makes_both_kinds_of_branches(empty: Path, tmp_path: Path, invoke: Command) -> None:
    source = write_model(tmp_path / "tiny", num_hidden_layers=1)
    body = (
        "  variants: [{group_size: 32, desc_act: true, engine: gptqmodel}]\n"
        "awq: {variants: [{group_size: 32, engine: gptqmodel}]}\n"
    )
    path = write_recipe(tmp_path / "r.yaml", source, body)
    assert invoke("engines", "install", "gptqmodel", "--python", sys.executable).returncode == 0
    result = invoke("build", path, "--dist", tmp_path / "dist", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    for repo, damping in (("tiny-GPTQ", 0.1), ("tiny-AWQ", None)):
        branch = tmp_path / "dist" / repo / "main"
        manifest = json.loads((branch / "quantize-manifest.json").read_text())
        assert manifest["engine"]["name"] == "gptqmodel"
        assert {row.get("damp_percent") for row in manifest["ledger"]} == {damping}
        verified = invoke("verify", branch, "--source", source, "--no-load")
        assert verified.returncode == 0, verified.stdout
