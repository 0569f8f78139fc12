"""How much memory a build needs, and how it stays within a budget. Imports no torch.

The peak is the largest of three moments: all windows are embedded while the embeddings are still loaded; the widest
block runs; or the widest input of that block is solved. ``python -m benchmarks memory`` compares the predictions with
measured peaks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantize.errors import OutOfMemoryError, PlanError
from quantize.files.limits import memory_limits
from quantize.formats.tensors import TensorSpec
from quantize.planning.modules import LinearSpec, ModuleTable
from quantize.recipe.methods import GptqVariant, Variant
from quantize.recipe.schema import Calibration
from quantize.source.checkpoint import Checkpoint

PROCESS_BYTES = 570 * 2**20  # Python with torch, transformers and numba loaded
COMPUTE_BYTES = 4
GPU_COMPUTE_BYTES = 2  # bfloat16
GPU_CONTEXT_BYTES = 600 * 2**20  # CUDA itself and its libraries
GPU_SOLVE_BYTES = 3 * 2**31
ROW_BUDGET, LEAST_ROW_BUDGET = 192 * 2**20, 24 * 2**20
"""Bytes of weights, over all variants, solved together."""

_OUTPUT_PROJECTIONS = (
    "o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "wo", "w2",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """The memory of one calibration pass.

    Attributes:
        peak_bytes: predicted peak. parts: its components, in bytes by name.
        spilled: hidden states are in files. row_budget: bytes of weights solved together; None is the device's default.
        batch_tokens: tokens run through a block together.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    spilled: bool
    row_budget: int | None
    batch_tokens: int


@dataclass(frozen=True)
class MemoryModel:
    """Predicts the memory of a pass over a model for ``variants``.

    Attributes:
        imatrix: whether an importance matrix is collected too.
        shards: number of parts of the windows, whose statistics are added up.
        feedback: whether GGUF levels are solved with error feedback after the pass.
    """

    checkpoint: Checkpoint
    table: ModuleTable
    calibration: Calibration
    variants: Sequence[Variant]
    imatrix: bool = False
    shards: int = 1
    feedback: bool = False

    def within(self, budget: int | None) -> Memory:
        """The fastest settings within ``budget`` bytes; None sets no limit.

        Raises:
            PlanError: there are none; the message says how much is needed.
        """
        window, requested = self.calibration.sequence_length, self.calibration.batch_tokens
        ways: list[tuple[bool, int | None, int]] = [
            (False, None, requested),
            (True, None, requested),
            (True, LEAST_ROW_BUDGET, requested),
            (True, LEAST_ROW_BUDGET, min(requested, window)),
        ]
        found = None
        for spilled, row_budget, batch_tokens in ways:
            found = self._need(spilled, row_budget, batch_tokens)
            if budget is None or found.peak_bytes <= budget:
                return found
        assert found is not None
        assert budget is not None
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.parts.items() if size >= 5e6)
        raise PlanError(
            f"--memory {budget / 1e9:.2f} GB: this build needs at least {found.peak_bytes / 1e9:.2f} GB ({parts}); "
            "allow more, or build fewer branches at once with --only"
        )

    @cached_property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.checkpoint.size("hidden_size", "n_embd") or 0

    @property
    def states_bytes(self) -> int:
        """Bytes of the hidden states of one stream."""
        return self.calibration.samples * self.calibration.sequence_length * self.width * COMPUTE_BYTES

    @property
    def streams(self) -> int:
        """Number of streams of hidden states: the source's, and one of each branch with its own."""
        return 1 + self._own

    @property
    def _own(self) -> int:
        return sum(isinstance(variant, GptqVariant) and variant.propagate == "quantized" for variant in self.variants)

    @property
    def _has_awq(self) -> bool:
        return any(not isinstance(variant, GptqVariant) for variant in self.variants)

    @property
    def gpu_bytes(self) -> int:
        """Bytes of GPU memory, with two blocks at a time. Hidden states stay in host memory."""
        linears, inputs = self._widest_block()
        block = sum(one.in_features * one.out_features for one in linears) * GPU_COMPUTE_BYTES
        statistics = sum(size * size for size, _ in inputs) * 4 * (1 + 2 * self._own)
        widest = max(size for size, _ in inputs)
        tokens = max(self.calibration.batch_tokens, self.calibration.sequence_length)
        # AWQ looks for what can take its scales on blocks that run in float32
        bytes_of_state = COMPUTE_BYTES if self._has_awq else GPU_COMPUTE_BYTES
        running = tokens * bytes_of_state * (3 * widest + 4 * self.width)
        working = max(running, 3 * widest * widest * 4 + GPU_SOLVE_BYTES)
        return GPU_CONTEXT_BYTES + self._outside * GPU_COMPUTE_BYTES + 2 * block + statistics + working

    @property
    def _outside(self) -> int:
        """Bytes loaded outside the blocks. An untied head has the embedding's shape and is never loaded here, so shapes
        are counted once."""
        return sum(math.prod(shape) for shape in {spec.shape for spec in self._tensors_outside})

    @property
    def _tensors_outside(self) -> list[TensorSpec]:
        return [spec for name, spec in self.checkpoint.tensors.items() if not self.table.is_in_block(name)]

    def _need(self, spilled: bool, row_budget: int | None, batch_tokens: int) -> Memory:
        linears, inputs = self._widest_block()
        block = sum(one.in_features * one.out_features for one in linears) * COMPUTE_BYTES
        shared = len(self.variants) > self._own or self.imatrix
        squares = sum(size * size for size, _ in inputs) * 4
        statistics = squares * (int(shared) + 2 * self._own)  # each further stream has H and its drift
        states = 0 if spilled else self.streams * self.states_bytes
        tokens = max(batch_tokens, self.calibration.sequence_length)
        widest = max(size for size, _ in inputs)
        running = tokens * COMPUTE_BYTES * (3 * widest + 4 * self.width)
        if self._own:  # the source's rows of each input, from which the drift is computed
            running += tokens * 4 * sum(size for size, _ in inputs)
        worn = 2 * block if self._own else 0
        solving = max(self._solving(size, rows, row_budget or ROW_BUDGET, statistics) for size, rows in inputs) + worn
        # a tensor is read before it is converted
        as_stored = max((spec.nbytes for spec in self._tensors_outside), default=0)
        moments: list[dict[str, int]] = [
            {"embeddings": self._outside * COMPUTE_BYTES + as_stored},
            # the sum over the shards so far, and the present shard's statistics
            {"block": block, "statistics": statistics * min(self.shards, 2), "forward pass": running},
            {"block": block, "solver": solving},
        ]
        if self.feedback:
            moments.append(
                max(({"GGUF solver": _feedback_bytes(*one)} for one in inputs), key=lambda it: sum(it.values()))
            )
        common = {"process": PROCESS_BYTES, "hidden states": states}
        parts = common | max(moments, key=lambda moment: sum(moment.values()))
        return Memory(sum(parts.values()), parts, spilled, row_budget, batch_tokens)

    def _solving(self, size: int, rows: int, row_budget: int, statistics: int) -> int:
        """Bytes for an input of ``size`` channels whose linears have ``rows`` outputs in total."""
        square, weight = size * size * 4, size * rows * 4
        # inputs are solved from narrowest to widest and freed one by one, but AWQ needs them all first
        held = max(square, min(statistics, 2 * square)) if not self._has_awq else statistics + square + weight
        factor = max(3 * square, 2 * weight)
        codes = max(1, len(self.variants)) * size * rows
        together = min(row_budget, codes * 4)
        polish = 3 * together // max(1, len(self.variants))  # the difference from the weight, of one variant at a time
        return held + weight + max(factor, square + together * 3 // 2 + polish + codes)

    def _widest_block(self) -> tuple[list[LinearSpec], list[tuple[int, int]]]:
        """The linears of the largest block, and (in_features, total outputs of its readers) of each of its inputs."""
        blocks: dict[int, list[LinearSpec]] = defaultdict(list)
        for linear in self.table.linears:
            blocks[linear.block].append(linear)
        widest = max(blocks.values(), key=lambda block: sum(one.in_features * one.out_features for one in block))
        rows: dict[tuple[str, str, int], int] = defaultdict(int)
        for one in widest:
            rows[input_of(one)] += one.out_features
        return widest, [(size, count) for (_, _, size), count in rows.items()]


def _feedback_bytes(size: int, rows: int) -> int:
    """Bytes for solving GGUF tensors of ``rows`` rows with one input: H, damped, and its factor; the weight, what is
    left of it, values, and codes."""
    return 4 * size * size * 4 + 7 * size * rows * 4


SURELY = 0.55
"""Fraction of the predicted memory, without the libraries, that a build certainly needs: predictions err on the safe
side."""


def check_limits(memory: Memory) -> None:
    """Refuse a build that would exceed a limit on this process's memory.

    Call it after loading the libraries that a build needs: their memory is then known and not predicted.

    Raises:
        OutOfMemoryError: the limit is too low; the message gives it and the memory needed.
    """
    more = int(SURELY * (memory.peak_bytes - PROCESS_BYTES))
    for limit in memory_limits():
        if limit.used is None or limit.used + more <= limit.nbytes:
            continue
        room = max(0, limit.nbytes - limit.used) + PROCESS_BYTES
        raise OutOfMemoryError(
            f"not enough memory: the build needs at least {more / 1e9:.2f} GB besides the {limit.used / 1e9:.2f} GB "
            f"that this process already uses, which is more than {limit}; allow more, or limit the build with "
            f"--memory {room / 1e9:.2f}GB"
        )


def distinct_inputs(table: ModuleTable) -> list[tuple[int, int, float]]:
    """(block, in_features, fraction of the tokens) of each distinct input: linears of one parent module share one,
    except output projections."""
    return list(
        {
            (linear.block, *input_of(linear)): (linear.block, linear.in_features, linear.share)
            for linear in table.linears
        }.values()
    )


def input_of(linear: LinearSpec) -> tuple[str, str, int]:
    parent, _, leaf = linear.local.rpartition(".")
    return parent, leaf if leaf in _OUTPUT_PROJECTIONS else "", linear.in_features
