"""Rows of GGUF tensors solved onto their own block type: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantize.formats.ggml_blocks import BLOCK_TYPES, Blocks, decode, encode
from quantize.methods.block_scales import BlockGrid, Scaled, solve_blocks


@dataclass(frozen=True)
class BlockJob:
    """Rows with one input and one block type, to be solved with the codes and scales of llama.cpp's quantizer.

    Attributes:
        kind: the type, of :data:`quantize.formats.ggml_blocks.BLOCK_TYPES`.
        weight: [N, K] float32. hessian: [K, K] float32. first: the quantizer's bytes, uint8 [N, bytes of a row].
    """

    kind: str
    weight: torch.Tensor
    hessian: torch.Tensor
    first: NDArray[np.uint8]


@dataclass(frozen=True)
class SolvedBlocks:
    """What became of a job.

    Attributes:
        data: uint8 [N, bytes of a row]. before, after: R H R^T of each row with the quantizer's bytes and with these,
            energy: W H W^T of each row; [N] float64.
    """

    data: NDArray[np.uint8]
    before: torch.Tensor
    after: torch.Tensor
    energy: torch.Tensor


BlockFuture = Callable[[], SolvedBlocks]
"""Gives the result of a job, after waiting for it; raises SolveError where it cannot be done."""


def solve_block_job(job: BlockJob) -> SolvedBlocks:
    """Solve a job in this process.

    Raises:
        SolveError: as :func:`quantize.methods.block_scales.solve_blocks`.
    """
    device = job.weight.device
    with torch.inference_mode():
        grid, first = grid_of(job.kind, device), _on(decode(job.first, job.kind), device)
        solved = solve_blocks(job.weight, job.hessian, first, grid)
        return SolvedBlocks(encode(_off(solved.scaled, job.kind)), solved.before, solved.after, solved.energy)


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
