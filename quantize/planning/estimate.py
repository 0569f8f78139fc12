"""Predict a build's time and memory.

Operations are counted exactly and divided by this machine's rate of matrix products, which is measured within a few
hundredths of a second; the fraction of that rate that each stage reaches was measured (docs/benchmarks.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.files.threads import thread_count
from quantize.planning.feedback import Feedback, disk_bytes
from quantize.planning.memory import PROCESS_BYTES, MemoryModel, distinct_inputs
from quantize.planning.modules import ModuleTable
from quantize.recipe.methods import GptqVariant, Variant
from quantize.recipe.schema import Calibration
from quantize.source.checkpoint import Checkpoint

SHARE_FORWARD, SHARE_STATISTICS, SHARE_SOLVE = 0.55, 0.8, 0.25
MSE_FACTOR = 1.4
POLISH = 1.6  # cost of the descent after a solve, relative to the solve
AWQ_SEARCH = 1.0  # cost of the scale search, relative to a solve
FEEDBACK_SOLVES = 6.0
"""Operations of error feedback on a GGUF tensor for each of its weights and inputs: columns, and sweeps over scales and
codes."""
SETUP_SECONDS = 15.0

CONVERT_SECONDS = 15.0
COMPARED_PER_SECOND, DEQUANTIZED_PER_SECOND = 1.5e8, 6e7  # logits compared with the source's; weights dequantized
LEVEL_RATES = (
    ("F", 500.0), ("BF", 500.0), ("Q8", 270.0), ("Q4_0", 125.0), ("Q4_1", 125.0), ("Q5_0", 100.0), ("Q5_1", 100.0),
    ("Q6", 55.0), ("Q3", 62.0), ("Q2", 60.0), ("Q4", 35.0), ("Q5", 35.0), ("IQ4", 10.0), ("IQ3", 5.0), ("IQ2", 1.0),
    ("IQ1", 0.2),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of a build on this machine's CPU.

    Attributes:
        seconds: time of the whole build. peak_bytes: peak of memory.
        kept_bytes: disk space, besides the branches and levels, for what is needed to resume an interrupted build:
            hidden states, and for error feedback Hessians and solved tensors.
        gpu_bytes: GPU memory of a build on a GPU, which holds two blocks because the next one is prefetched.
    """

    seconds: float
    peak_bytes: int
    kept_bytes: int = 0
    gpu_bytes: int = 0


def estimate(
    checkpoint: Checkpoint,
    table: ModuleTable,
    calibration: Calibration,
    variants: Sequence[Variant],
    *,
    levels: Sequence[tuple[str, int]] = (),
    imatrix: bool = False,
    feedback: Sequence[Feedback] = (),
    budget: int | None = None,
    shards: int = 1,
) -> Estimate:
    """Predict time and peak memory of one calibration pass, the solves of ``variants``, and GGUF ``levels``.

    Args:
        levels: name of each level and bytes of its full-width file. imatrix: whether they need the pass.
        feedback: the tensors of those that are solved with error feedback.
        budget: memory limit in bytes. shards: number of parts of the calibration windows.

    Raises:
        PlanError: the build cannot stay within the budget.
    """
    gathers = imatrix or bool(feedback)
    passed = bool(variants) or gathers
    quantizing = sum(nbytes / (1e6 * _megabytes_per_second(level)) for level, nbytes in levels)
    quantizing = quantizing / thread_count() + (CONVERT_SECONDS if levels else 0.0)
    if not passed:
        return Estimate(quantizing, PROCESS_BYTES if levels else 0)
    tokens = calibration.samples * calibration.sequence_length
    model = MemoryModel(checkpoint, table, calibration, variants, gathers, shards, bool(feedback))
    inputs = distinct_inputs(table)
    forward = 2 * tokens * sum(linear.share * linear.in_features * linear.out_features for linear in table.linears)
    forward += 4 * tokens * calibration.sequence_length * model.width * table.blocks
    statistics = 2 * tokens * sum(share * size * size for _, size, share in inputs)
    trailing = sum(linear.out_features * linear.in_features**2 for linear in table.linears)
    solve = sum(trailing * ((MSE_FACTOR if variant.mse else 1) + variant.polish * POLISH) for variant in variants)
    gptq = [variant for variant in variants if isinstance(variant, GptqVariant)]
    awq = len(variants) - len(gptq)  # each has its own scales, so its own Hessian and factor
    factors = len({(variant.damp_percent, variant.damping, bool(variant.desc_act)) for variant in gptq}) + awq
    solve += awq * AWQ_SEARCH * trailing + factors * sum(size**3 for _, size, _ in inputs)
    solve += FEEDBACK_SOLVES * sum(
        math.prod(one.shape) * one.shape[-1]
        for one in {(one.name, one.kind): one for level in feedback for one in level.targets}.values()
    )
    rate = _operations_per_second()
    own = sum(variant.propagate == "quantized" for variant in gptq)
    passes = int(own < len(variants) or gathers) + own
    forwards = 1 + 2 * own
    solve += 2 * own * sum(size**3 for _, size, _ in inputs)
    drifts = own * statistics
    seconds = (
        forwards * forward / SHARE_FORWARD + (passes * statistics + drifts) / SHARE_STATISTICS + solve / SHARE_SOLVE
    )
    return Estimate(
        seconds / rate + SETUP_SECONDS + quantizing,
        model.within(budget).peak_bytes,
        2 * model.streams * model.states_bytes + disk_bytes(feedback, table.linears),
        model.gpu_bytes,
    )


def measuring_seconds(checkpoint: Checkpoint, table: ModuleTable, samples: int, length: int, branches: int) -> float:
    """Predict how long it takes to measure finished variants on ``samples`` windows of ``length`` tokens."""
    tokens = samples * length
    width, vocabulary = checkpoint.size("hidden_size", "n_embd") or 0, checkpoint.size("vocab_size") or 0
    weights = sum(linear.in_features * linear.out_features for linear in table.linears)
    used = sum(linear.share * linear.in_features * linear.out_features for linear in table.linears)
    forward = 2 * tokens * used + 4 * tokens * length * width * table.blocks
    operations = (forward + 2 * tokens * vocabulary * width) / SHARE_FORWARD
    seconds = operations / _operations_per_second() + tokens * vocabulary / COMPARED_PER_SECOND
    return SETUP_SECONDS + (branches + 2) * seconds + branches * weights / DEQUANTIZED_PER_SECOND


def _megabytes_per_second(level: str) -> float:
    """Full-width input that one core quantizes per second, in MB, measured on one machine."""
    return next((rate for start, rate in LEVEL_RATES if level.startswith(start)), 50.0)


def _operations_per_second() -> float:
    import numpy as np

    left = np.ones((768, 768), dtype=np.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best
