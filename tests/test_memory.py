"""A model whose weights exceed the process's limit on memory builds under it: blocks stream by one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.formats.reader import BranchReader
from tests.tiny import write_model, write_recipe

HEADROOM = 48 * 2**20  # 40 are enough


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit that is set exists on Linux only")
def test_weights_larger_than_the_memory_limit(tmp_path: Path) -> None:
    model = write_model(tmp_path / "large", hidden_size=512, intermediate_size=512, num_hidden_layers=34)
    weights = (model / "model.safetensors").stat().st_size
    assert weights > 2 * HEADROOM
    variants = "  variants: [{bits: 4}, {bits: 8, desc_act: true}]"
    recipe = write_recipe(tmp_path / "recipe.yaml", model, variants)
    small = write_recipe(tmp_path / "small.yaml", write_model(tmp_path / "small"), variants)
    command = [sys.executable, "-m", "tests.limited", small, recipe, tmp_path / "dist", HEADROOM, weights]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["limit_bites"]
    assert len(found["built"]) == 2
    (branch,) = (tmp_path / "dist").glob("*/gptq-8bit*")
    linear = BranchReader(branch).weight("model.layers.33.mlp.down_proj")
    assert linear.shape == (512, 512)
