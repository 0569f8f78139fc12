"""How a command ends: its exit code, by what happened and the same in every command; signals; limits on memory; a cache
that cannot be used; defects."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from outcome import assert_refused, contents

from quantize import errors
from quantize.errors import QuantizeError, is_memory_shortage, shortly
from quantize.publishing import card

CODES = Path(__file__).parent.parent / "docs" / "exit-codes.md"
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits on memory are met on Linux only")


# -- the codes


def test_every_type_of_error_stands_in_the_table_with_its_code() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", CODES.read_text(encoding="utf-8"), re.MULTILINE))
    kinds = inspect.getmembers(errors, lambda one: isinstance(one, type) and issubclass(one, QuantizeError))
    assert {name: str(kind.exit_code) for name, kind in kinds if kind is not QuantizeError} == table


def test_help_shows_the_codes_where_they_apply(invoke: Command) -> None:
    assert "3 a check's answer is no" in invoke("--help").stdout
    for command in (["plan"], ["push"], ["lint"], ["verify"], ["rebuild"], ["engines", "check"]):
        assert re.search(r"code\s+3", invoke(*command, "--help").stdout), command


def test_input_is_2_work_is_1_and_a_check_is_3(invoke: Command, tiny_recipe: Path, dist: Path, tmp_path: Path) -> None:
    assert invoke("plan", tiny_recipe, "--dist", dist, "--check").returncode == 3
    assert_refused(invoke("plan", tiny_recipe, "--set", "gptq.variants.0.bits=5"), code=2)
    assert_refused(invoke("plan", tiny_recipe, "--set", f"model.source={tmp_path}"), code=2)
    assert_refused(invoke("build", tiny_recipe, "--dist", dist, "--memory", "1MB"), "--memory", code=2)
    assert_refused(invoke("push", tiny_recipe, "--dist", tmp_path), "quantize build", code=2)
    (tmp_path / "file").write_text("")
    assert_refused(invoke("build", tiny_recipe, "--dist", tmp_path / "file" / "dist"), "cannot be written", code=1)


def test_a_hub_that_cannot_be_reached_is_1(run_quantize: Command, tiny_recipe: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = run_quantize("plan", tiny_recipe, "--set", "model.source=a/b", env=nowhere)
    assert_refused(result, "a/b", "could not be reached", code=1)


def test_a_branch_of_which_nothing_is_known_is_not_verified(invoke: Command, dist: Path) -> None:
    branch = dist / "tiny-llama-GPTQ" / "main"
    assert invoke("verify", branch, "--no-load").returncode == 0
    (branch / "quantize-manifest.json").unlink()
    result = invoke("verify", branch, "--no-load")
    assert result.returncode == 3
    assert "every check was skipped" in result.stderr


@pytest.mark.parametrize("command", ["prune", "clean", "gc"])
def test_a_question_that_nobody_can_answer_says_so(
    command: str, run_quantize: Command, tiny_recipe: Path, both: Path, tmp_path: Path
) -> None:
    (both / ".quantize" / "unfinished").mkdir(parents=True, exist_ok=True)
    options = {
        "prune": [tiny_recipe, "--dist", both, "--where", "dist", "--set", "gptq.variants=[{branch: main, bits: 4}]"],
        "clean": ["--dist", both],
        "gc": ["--older-than", "0"],
    }[command]
    entry = tmp_path / "cache" / "hashes" / "x"
    entry.parent.mkdir(parents=True)
    entry.write_text("{}")
    before = contents(both)
    result = run_quantize(command, *options, env={"QUANTIZE_CACHE": str(tmp_path / "cache")}, stdin=subprocess.DEVNULL)
    if command == "clean":  # nothing is unfinished here, and so nothing is asked
        assert result.returncode == 0
    else:
        assert_refused(result, "--yes")
    assert {name: found for name, found in contents(both).items() if name in before} == before
    assert entry.is_file()


def test_a_defect_keeps_its_traceback_and_is_called_one(
    run_quantize: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, quantize.planning.planner as p\n"
        "def broken(*a, **k): raise KeyError('ours')\n"
        "p.find_linears = broken\n"
        "from quantize.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(tiny_recipe), "--dist", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "KeyError: 'ours'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: this is a bug in quantize")


# -- what a message shows


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\x1b[2J", 10**5000, [[[[[[1]]]]]] * 1000, {"a" * 999: "b" * 999}, {1, 2}, None, object()],
    ids=["long", "escape", "number", "nested", "mapping", "set", "none", "object"],
)  # fmt: skip
def test_a_value_is_shown_shortly(value: object) -> None:
    assert len(shortly(value)) <= 80
    assert shortly(value).isprintable()
    assert " at 0x" not in shortly(value)


def test_a_value_of_aliases_is_shown_without_being_unfolded() -> None:
    bomb: list[object] = ["x"]
    for _ in range(64):
        bomb = [bomb] * 10
    assert len(shortly(bomb)) <= 80


@pytest.mark.parametrize("text", ["x" * 9000, "a long text " * 900], ids=["word", "text"])
def test_a_message_is_one_short_line(invoke: Command, tiny_recipe: Path, text: str) -> None:
    for words in (["validate", text], ["validate", tiny_recipe, "--set", f"calibration.samples={text}"], [text]):
        result = invoke(*words)
        assert result.returncode == 2
        assert max(map(len, result.stderr.splitlines())) < 1100
    assert len(str(QuantizeError(f"{text}: {text}"))) <= 1000


# -- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_build_as_ctrl_c_does(name: str, tiny_recipe: Path, dist: Path) -> None:
    before = contents(dist)
    command = [sys.executable, "-m", "quantize", "build", str(tiny_recipe), "--dist", str(dist), "--device", "cpu",
               "--set", "calibration.samples=400", "--set", "calibration.batch_tokens=64"]  # fmt: skip
    number = getattr(signal, name)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline and not any(dist.rglob("eight/*.safetensors")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1] == f"interrupted by {name}; finished branches are untouched"
    assert "Traceback" not in said
    main = {path: found for path, found in contents(dist).items() if not path.startswith(".quantize")}
    assert main == {path: found for path, found in before.items() if not path.startswith(".quantize")}


def test_what_is_stopped_elsewhere_does_not_speak_of_branches(
    invoke: Command, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(card, "render", stop)
    result = invoke("card", tiny_recipe, "--dist", tmp_path, "--print", "gptq")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "aborted")


def test_a_library_call_leaves_signals_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    from quantize.options import PlanOptions
    from quantize.planning.planner import plan_recipe
    from quantize.recipe import load_recipe

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    plan_recipe(load_recipe(tiny_recipe), PlanOptions(dist=tmp_path))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


# -- memory


def limited(kind: str, nbytes: int) -> Callable[[], None]:
    def limit() -> None:
        import resource

        resource.setrlimit(getattr(resource, kind), (nbytes, nbytes))

    return limit


@LINUX
@pytest.mark.parametrize(("kind", "megabytes"), [("RLIMIT_AS", 150), ("RLIMIT_AS", 800), ("RLIMIT_DATA", 400)])
def test_a_limit_on_memory_is_met_with_a_sentence(
    run_quantize: Command, tiny_recipe: Path, dist: Path, kind: str, megabytes: int
) -> None:
    before = contents(dist)
    result = run_quantize(
        "build", tiny_recipe, "--dist", dist, "--device", "cpu", preexec_fn=limited(kind, megabytes * 10**6)
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: not enough memory")
    assert f"the limit of {megabytes / 1000:.2f} GB (ulimit -{'v' if kind == 'RLIMIT_AS' else 'd'})" in last
    assert "Traceback" not in result.stderr
    assert {name: found for name, found in contents(dist).items() if name in before} == before


@LINUX
def test_a_build_that_will_not_fit_is_refused_before_it_begins(
    run_quantize: Command, tiny_recipe: Path, tmp_path: Path
) -> None:
    # too much for the memory, and not for a disk with 25 GB to spare, which is looked at before
    large = ["--set", "calibration.samples=80000", "--set", "calibration.sequence_length=256"]
    result = run_quantize(
        "build", tiny_recipe, "--dist", tmp_path / "dist", "--device", "cpu", *large,
        preexec_fn=limited("RLIMIT_AS", 5 * 10**9),
    )  # fmt: skip
    assert_refused(result, "not enough memory: the build needs at least", "(ulimit -v)", "--memory", code=1)
    assert not list((tmp_path / "dist").glob("tiny*"))


def test_an_interrupt_inside_an_exec_of_a_string_has_its_exit_code_too(tmp_path: Path) -> None:
    """As while a dataclass is being made; CPython remembers such a one until the process ends."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom quantize.cli import build, main\n"
        "build.build.callback = lambda **_: exec('raise KeyboardInterrupt')\n"
        "sys.argv[1:] = ['build', __file__]\nmain()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr.strip()) == (130, "interrupted; finished branches are untouched")


@LINUX
def test_a_child_under_a_limit_answers_as_the_command_does(
    run_quantize: Command, tiny_recipe: Path, dist: Path
) -> None:
    plain = run_quantize("plan", tiny_recipe, "--dist", dist, "--check", "--json")
    under = run_quantize(
        "plan", tiny_recipe, "--dist", dist, "--check", "--json", preexec_fn=limited("RLIMIT_AS", 20 * 10**9)
    )
    assert (under.returncode, under.stderr) == (plain.returncode, plain.stderr)
    assert [line for line in under.stdout.splitlines() if "seconds" not in line] == [
        line for line in plain.stdout.splitlines() if "seconds" not in line
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError("libx.so: cannot map zero-fill pages"), BlockingIOError(11, "Resource temporarily"),
    ],
)  # fmt: skip
def test_a_shortage_of_memory_is_known_by_what_libraries_say(error: Exception) -> None:
    assert is_memory_shortage(error)
    wrapped = ValueError("something else")
    wrapped.__cause__ = error
    assert is_memory_shortage(wrapped)
    assert not is_memory_shortage(ValueError("something else"))


# -- the cache


@pytest.mark.parametrize(("command", "code"), [("build", 1), ("status", 0), ("plan --check", 3)])
def test_a_cache_that_cannot_be_written_ends_a_build_and_no_look(
    command: str, code: int, invoke: Command, tiny_recipe: Path, dist: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("no folder")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv("QUANTIZE_CACHE", str(cache))
    before = contents(dist)
    result = invoke(*command.split(), tiny_recipe, "--dist", dist)
    if code == 1:
        assert_refused(result, f"{cache}: the cache cannot be used", "QUANTIZE_CACHE", code=1)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert contents(dist) == before


def test_a_cache_of_nobody_is_no_folder_of_that_name(
    invoke: Command, tiny_recipe: Path, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTIZE_CACHE", "~nobody-of-this-name/cache")
    assert_refused(invoke("status", tiny_recipe, "--dist", dist), "QUANTIZE_CACHE", code=1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps caches elsewhere")
@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, "home/.cache/quantize"),
        ({"XDG_CACHE_HOME": "{}/caches"}, "caches/quantize"),
        ({"XDG_CACHE_HOME": "{}/caches", "QUANTIZE_CACHE": "{}/own"}, "own"),
        ({"QUANTIZE_CACHE": "~/own"}, "home/own"),
    ],
)
def test_where_the_cache_lies(
    variables: dict[str, str], place: str, invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "QUANTIZE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    found = json.loads(invoke("gc", "--older-than", "1", "--dry-run", "--json").stdout)
    assert found["cache"] == str(tmp_path / place)
