"""A bounded number of fuzzed inputs for each target: success or one sentence, in little time and memory.

Long runs: ``python -m benchmarks fuzz``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzzing.campaign import run_target
from tests.fuzzing.judge import judged
from tests.fuzzing.material import Material
from tests.fuzzing.targets import TARGETS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guards on time and memory are of Linux")


@pytest.fixture(scope="module")
def material(tiny_llama: Path, tiny_recipe: Path, complete: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"), tiny_llama, tiny_recipe, complete)


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_what_none_may(name: str, material: Material, tmp_path: Path) -> None:
    target = TARGETS[name]
    tally = run_target(name, material, tmp_path / "fuzz", target.bounded)
    assert tally.inputs == target.bounded
    assert tally.faults == {}
    assert tally.sameness < 0.97, f"nearly all inputs end alike, and so try one thing: {tally.reasons.most_common(1)}"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("TypeError", "int([])"),
        ("hangs", "while True: pass"),
        ("MemoryError", "bytearray(3 * 10**9)"),
        ("not printable", "from tests.fuzzing.judge import Fault; raise Fault('a line that is not printable')"),
    ],
)
def test_the_judge_sees_what_none_may_do(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzzing.judge.SECONDS", 0.2)
    _, fault = judged(lambda: exec(code))
    assert name in (fault or "")
