"""A number of inputs for a target."""

from __future__ import annotations

import os
import random
from pathlib import Path
from unittest.mock import patch

from tests.fuzzing.judge import Tally, judged, tree
from tests.fuzzing.material import Material
from tests.fuzzing.targets import TARGETS


def run_target(name: str, material: Material, folder: Path, inputs: int, seed: int = 0) -> Tally:
    """Run a target's inputs below ``folder``. The same seed gives the same inputs.

    Returns:
        what came of them; files that appear in the home folder, which no input has to do with, are a fault too.
    """
    dice = random.Random(f"{name} {seed}")
    scratch, home = folder / "scratch", folder / "home"
    scratch.mkdir(parents=True)
    home.mkdir()
    (home / "canary").write_text("untouched")
    tally, before = Tally(), tree(home)
    cache = os.environ.get("QUANTIZE_CACHE") or str(folder / "cache")
    with patch.dict(os.environ, {"HOME": str(home), "QUANTIZE_CACHE": cache, "HF_HUB_OFFLINE": "1"}):
        cases = TARGETS[name].inputs(material, scratch, dice)
        for number in range(inputs):
            shown, action = next(cases)
            refusal, fault = judged(action)
            tally.add(refusal, fault, f"input {number}: {shown}")
    if tree(home) != before:
        tally.add("", "a file outside was written or changed", str(sorted(set(tree(home)) ^ set(before)))[:200])
    return tally
