"""Settings under which a GPU computes exactly and gives the same bytes again."""

from __future__ import annotations

import os

import torch


def make_repeatable(device: torch.device) -> None:
    """Settle how this process computes on a GPU: float32 products in full float32, equal results in every run.

    TensorFloat-32 keeps 10 bits of each factor, with which X^T X is no Hessian of X any more. cuBLAS is repeatable with
    a fixed workspace, whose size it reads from the environment when it starts. An operation that has no repeatable
    version warns. On a CPU nothing changes.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing here reads what it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
