"""Rows of GGUF tensors solved onto their own block type: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.errors import SolveError
from quantize.formats.ggml_blocks import BLOCK_TYPES, Blocks, decode, encode
from quantize.methods.block_scales import BlockGrid, Scaled, solve_blocks
from quantize.methods.factor import Damping
from quantize.methods.fixed_grid import prepare


@dataclass(frozen=True)
class BlockRows:
    """Rows of one block type.

    Attributes:
        kind: the type, of :data:`quantize.formats.ggml_blocks.BLOCK_TYPES`.
        weight: gives them, [N, K] float32. first: the bytes of llama.cpp's quantizer, uint8 [N, bytes of a row].
    """

    kind: str
    weight: Callable[[], torch.Tensor]
    first: NDArray[np.uint8]


@dataclass(frozen=True)
class BlockJob:
    """Rows of several types that multiply one input, to be solved from the scales of llama.cpp's quantizer.

    Attributes:
        hessian: of the input, [K, K] float32.
    """

    hessian: torch.Tensor
    parts: Sequence[BlockRows]


@dataclass(frozen=True)
class SolvedRows:
    """The result for rows of one type.

    Attributes:
        data: uint8 [N, bytes of a row]. before, after: R H R^T of each row with the quantizer's bytes and with these,
            energy: W H W^T of each row; [N] float64. rule, damp_percent: the damping that was used.
    """

    data: NDArray[np.uint8]
    before: torch.Tensor
    after: torch.Tensor
    energy: torch.Tensor
    rule: Damping
    damp_percent: float


BlockFuture = Callable[[], list[SolvedRows]]
"""Gives the result for each part of a job, after waiting for it; raises SolveError where it cannot be done."""


def solve_block_job(job: BlockJob) -> list[SolvedRows]:
    """Solve a job in this process.

    Raises:
        SolveError: the Hessian is not finite, or not positive definite at any damping tried.
    """
    solved = []
    with torch.inference_mode():
        if not bool(torch.isfinite(job.hessian).all()):
            raise SolveError("its Hessian is not finite")
        prepared = prepare(job.hessian)
        factor = prepared.factor
        for part in job.parts:
            weight, grid = part.weight(), grid_of(part.kind, job.hessian.device)
            first = _on(decode(part.first, part.kind), job.hessian.device)
            found = solve_blocks(weight, prepared, first, grid)
            data = encode(_off(found.scaled, part.kind))
            sums = found.before, found.after, found.energy
            solved.append(SolvedRows(data, *sums, factor.rule, factor.damp_percent))
    return solved


def grid_of(kind: str, device: torch.device) -> BlockGrid:
    """What a block type can hold."""
    layout = BLOCK_TYPES[kind]
    levels = None if layout.codebook is None else torch.tensor(layout.codebook, dtype=torch.float32, device=device)
    return BlockGrid(
        layout.size, layout.group, layout.lowest, layout.highest, levels,
        layout.lowest_scale, layout.highest_scale, layout.minima, layout.dmin is not None,
    )  # fmt: skip


def _on(blocks: Blocks, device: torch.device) -> Scaled:
    def wide(values: NDArray[np.float16] | NDArray[np.int16]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    return Scaled(
        torch.from_numpy(blocks.codes).to(device),
        wide(blocks.d),
        wide(blocks.scales),
        None if blocks.dmin is None else wide(blocks.dmin),
        None if blocks.minima is None else wide(blocks.minima),
    )


def _off(scaled: Scaled, kind: str) -> Blocks:
    def half(values: torch.Tensor) -> NDArray[np.float16]:
        found: NDArray[np.float16] = values.to(torch.float16).cpu().numpy()
        return found

    def whole(values: torch.Tensor) -> NDArray[np.int16]:
        found: NDArray[np.int16] = values.to(torch.int16).cpu().numpy()
        return found

    return Blocks(
        kind,
        whole(scaled.codes),
        half(scaled.d),
        whole(scaled.scales),
        None if scaled.dmin is None else half(scaled.dmin),
        None if scaled.minima is None else whole(scaled.minima),
    )
