"""``python -m tests.interpreted``, with TRITON_INTERPRET=1: the GPU's kernel, run by Triton's interpreter on the CPU.

Prints as JSON for each variant whether the kernel's solution is that of the compiled CPU kernel and that of torch. The
interpreter replaces parts of Triton for good, and is chosen when Triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import quantize.methods.gptq
from quantize.methods.gptq import GptqParameters, solve

sys.path.insert(0, str(Path(__file__).parent))
from test_solver import equal, problem

COLUMNS, RUN = 48, 16  # three runs of columns

SEARCHING = [
    GptqParameters(4, 16),
    GptqParameters(3, -1, True, sym=False),  # a group longer than a run
    GptqParameters(2, 16, "static", sym=False),
]
PLAIN = [
    GptqParameters(8, -1, True, mse=False),
    GptqParameters(4, 16, act_group_aware=False, sym=False, mse=False),
    GptqParameters(3, 16, "static", mse=False),
]


def compared(rows: int, variants: list[GptqParameters]) -> list[dict[str, Any]]:
    """Solve a weight that has rows, groups and columns without anything in them."""
    weight, hessian = problem(rows, COLUMNS, torch.float32)
    weight[1], weight[2, 16:32], weight[3] = 0, 0, weight[3].abs()
    dead = torch.tensor([2, 40])
    hessian[dead], hessian[:, dead] = 0, 0
    on_gpu, on_cpu, in_torch = (solve(weight, hessian, variants, kernel=name) for name in ("triton", "numba", "torch"))
    return [
        {
            "variant": asdict(asked),
            "numba": equal(one, two),
            "torch": equal(one, three),
            "row_error": torch.allclose(one.row_error, two.row_error, rtol=1e-6, atol=1e-9),
        }
        for asked, one, two, three in zip(variants, on_gpu, on_cpu, in_torch, strict=True)
    ]


def main() -> None:
    quantize.methods.gptq.OUTER = RUN
    # fewer rows than the kernel takes at once, and one more
    print(json.dumps([*compared(5, SEARCHING), *compared(33, PLAIN)]))


if __name__ == "__main__":
    main()
