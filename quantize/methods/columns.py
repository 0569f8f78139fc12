"""The inner loop of GPTQ: a run of columns rounded one by one, each error spread over the run's rest.

Rows are independent of each other, so the compiled kernels walk each row on its own: they fit the grid where a
group begins, round, spread, and sum errors, with no other pass over the data. There is one for the CPU (numba) and
one for the GPU (Triton). The torch version takes one column of all rows at a time; it is the reference, and the path
where no kernel is. All do the same operations in the same order and give the same codes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from quantize.methods.compiled import compiled
from quantize.methods.grid import REACHES, Grid

Kernel = Literal["numba", "triton", "torch"]


def kernel_of(device: torch.device, dtype: torch.dtype = torch.float32) -> Kernel:
    """Who runs the inner loop on a device: its compiled kernel where there is one, else torch.

    Triton compiles what launches a kernel with the system's C compiler.
    """
    if device.type == "cpu":
        return "numba"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    found = compiler is not None and importlib.util.find_spec("triton") is not None
    return "triton" if device.type == "cuda" and dtype == torch.float32 and found else "torch"


def fit_groups(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, size: int, kernel: Kernel | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of contiguous groups of ``size`` columns of a weight [N, K] as it is.

    Args:
        importance: what a squared error at each column costs, [K].
        kernel: who computes them; None is the device's own.

    Returns:
        Scales and zeros, [K / size, N], in the weight's dtype.
    """
    rows, columns = weight.shape
    kernel = kernel or kernel_of(weight.device, weight.dtype)
    if kernel == "triton":
        from quantize.methods.triton_columns import fit_groups as on_gpu

        return on_gpu(weight, importance, grid, size)
    if kernel == "numba":
        scales, zeros = (torch.empty(columns // size, rows, dtype=weight.dtype) for _ in range(2))
        reaches = torch.tensor(REACHES if grid.mse else REACHES[:1], dtype=weight.dtype)
        top = torch.tensor([grid.top], dtype=weight.dtype)
        tensors = (weight.contiguous(), importance, top, reaches, scales, zeros)
        with compiled() as kernels:
            kernels.fit_groups(*(tensor.numpy() for tensor in tensors), size, grid.sym)
        return scales, zeros
    fitted = [
        grid.fit(part, costs)
        for part, costs in zip(torch.split(weight, size, 1), torch.split(importance, size), strict=True)
    ]
    return torch.stack([scale for scale, _ in fitted]), torch.stack([zero for _, zero in fitted])


@dataclass
class Columns:
    """The state of a solve of V variants over N rows and K columns in solve order.

    Attributes:
        original: the weight, [N, K]. work: its copy for each variant, [V, N, K], taking the errors.
        upper: U, [K, K]. importance: 1 / U[j, j]^2, what an error at each column costs, [K].
        order: natural place of each column, [K] int64.
        groups: group of each column, [V, K] int64.
        sizes: group size of the variants whose grids are fitted on the way, 0 where they are fixed, [V] int64.
        scales, zeros: [V, G, N] in the weight's dtype.
        grids: the grid of each variant.
        codes: [V, N, K] uint8, in natural order.
        squares: sum of squared errors e^2, [V, N] float64. spread: sum of (w - q)^2, [V, N] float64.
        kernel: who runs the inner loop.
        settings: what the GPU kernel has to know of the variants, put there once a solve.
    """

    original: torch.Tensor
    work: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    sizes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    grids: list[Grid]
    codes: torch.Tensor
    squares: torch.Tensor
    spread: torch.Tensor
    kernel: Kernel
    settings: tuple[torch.Tensor, torch.Tensor] | None = None

    def round(self, first: int, last: int) -> torch.Tensor:
        """Round columns ``first`` to ``last``; ``work`` changes inside that run only.

        Returns:
            The errors (w - q) / U[j, j], [V, N, last - first].
        """
        errors = torch.empty(*self.work.shape[:2], last - first, device=self.work.device, dtype=self.work.dtype)
        if self.kernel == "numba":
            self._round_numba(errors, first, last)
        elif self.kernel == "triton":
            from quantize.methods.triton_columns import round_columns  # triton may not be there

            round_columns(self, errors, first, last)
        else:
            self._round_torch(errors, first, last)
        return errors

    def _round_numba(self, errors: torch.Tensor, first: int, last: int) -> None:
        tops = torch.tensor([grid.top for grid in self.grids], dtype=self.work.dtype)
        syms, searches = (torch.tensor([getattr(grid, name) for grid in self.grids]) for name in ("sym", "mse"))
        reaches = torch.tensor(REACHES, dtype=self.work.dtype)
        tensors = (
            self.original, self.work, self.upper, self.order, self.groups, self.sizes, self.scales, self.zeros,
            tops, syms, searches, reaches, self.importance, self.codes, errors, self.squares, self.spread,
        )  # fmt: skip
        with compiled() as kernels:
            kernels.round_columns(*(tensor.numpy() for tensor in tensors), first, last)

    def _round_torch(self, errors: torch.Tensor, first: int, last: int) -> None:
        tops = torch.tensor([grid.top for grid in self.grids], device=self.work.device, dtype=self.work.dtype)
        sizes = self.sizes.tolist()
        for column in range(first, last):
            for index, size in enumerate(sizes):
                if size and column % size == 0:
                    # beyond the run, earlier columns' errors have not arrived yet: a group never leaves its run
                    fitted = self.grids[index].fit(
                        self.work[index, :, column : column + size], self.importance[column : column + size]
                    )
                    group = self.groups[index, column]
                    self.scales[index, group], self.zeros[index, group] = fitted
            index3 = self.groups[:, column, None, None].expand(-1, 1, self.scales.shape[2])
            scale = torch.gather(self.scales, 1, index3)[:, 0]
            zero = torch.gather(self.zeros, 1, index3)[:, 0]
            weight = self.work[:, :, column]
            code = torch.minimum((torch.round(weight / scale) + zero).clamp_(min=0), tops[:, None])
            value = scale * (code - zero)
            error = (weight - value) / self.upper[column, column]
            self.codes[:, :, self.order[column]] = code.to(torch.uint8)
            errors[:, :, column - first] = error
            self.squares += error.double().square()
            self.spread += (self.original[:, column] - value).double().square()
            self.work[:, :, column + 1 : last] -= error[:, :, None] * self.upper[column, column + 1 : last]
