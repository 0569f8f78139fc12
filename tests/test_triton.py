"""The GPU's kernel without a GPU: run by Triton's interpreter, and compiled to the machine's assembly language."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize.methods.columns import kernel_of

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the extra `test` has Triton on x86-64 Linux only"
)
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from quantize.methods import triton_columns

kernel = triton_columns._round_columns
wide = {"order": "*i64", "groups": "*i64", "settings": "*i32", "codes": "*u8", "squares": "*fp64", "spread": "*fp64"}
numbers = ("rows", "columns", "most", "first", "length")
signature = {name: "i32" if name in numbers else wide.get(name, "*fp32") for name in kernel.arg_names}
constants = {"ROWS": triton_columns.ROWS, "LENGTH": 128}
signature |= dict.fromkeys(constants, "constexpr")
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(kernel, signature, constexprs=places)
print(compile(source, target=GPUTarget("cuda", 90, 32), options=triton_columns.OPTIONS).asm["ptx"])
"""


def child(*arguments: str, **settings: str) -> str:
    """What a Python process of its own prints; the test is skipped without Triton."""
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` has")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **settings}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_kernel_gives_what_the_cpu_kernel_and_torch_give() -> None:
    found = json.loads(child("-m", "tests.interpreted", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(found) == 6
    for row in found:
        assert all(row[name] for name in ("numba", "torch", "row_error")), row


def test_compiled_kernel_rounds_every_operation_by_itself(tmp_path: Path) -> None:
    assembly = child("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert ".target sm_90" in assembly
    assert "div.rn.f32" in assembly
    assert "cvt.rn.f16.f32" in assembly
    assert not re.findall(r"\b(?:fma\.\S+\.f32|mad\.\S+\.f32|div\.full\S*|div\.approx\S*|rcp\.approx\S*)", assembly)


def test_each_device_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert kernel_of(torch.device("cpu")) == "numba"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kernel_of(cuda) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert kernel_of(cuda) == "triton"
    assert kernel_of(cuda, torch.float64) == "torch"
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert kernel_of(cuda) == "torch"
