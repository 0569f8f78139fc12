"""GPTQ: rounding that compensates each column's error in the columns not yet rounded, for many variants at once.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022, https://arxiv.org/abs/2210.17323. In the paper's symbols: W is [N, K] (a
linear's weight, or several stacked that read the same input X), H = X^T X, inverse(H) = U^T U; column j is
rounded to q_j, its error e_j = (w_j - q_j) / U_jj, and every later column k loses e_j * U_jk.

Because W - Q = E U and H = inverse(U) inverse(U)^T, the error tr((W - Q) H (W - Q)^T) is the sum of all
e^2: the solve yields its own quality measure for free. What it found is polished by
:mod:`quantize.methods.descent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from quantize.errors import SolveError
from quantize.methods.columns import OUTER, fit_groups, kernel_of, solve_columns
from quantize.methods.descent import Rounded, descend
from quantize.methods.factor import Damping, Factor, activation_order, damping_rule, factorize, group_aware_order
from quantize.methods.grid import HALF_MAX, HALF_TINY, Grid
from quantize.methods.solve_state import Columns, Kernel
from quantize.methods.sums import energy

ROW_BUDGET = 192 * 2**20  # bytes of W, over all variants, processed together
GPU_ROW_BUDGET = 2**31  # on a GPU, which needs many rows at once to be busy


@dataclass(frozen=True)
class GptqParameters:
    """Parameters of one solve. ``group_size`` -1 means one group per row; ``desc_act`` is act-order;
    ``act_group_aware`` orders groups, and columns within each group, by activation if ``desc_act`` is False.
    ``damping`` says what ``damp_percent`` is a share of. ``signed_scales`` lets a symmetric group's scale be negative,
    which turns its grid round: it has one level more below zero than above. ``polish`` is coordinate descent after the
    solve."""

    bits: int
    group_size: int
    desc_act: bool | Literal["static"] = False
    sym: bool = True
    damp_percent: float = 0.1
    mse: bool = True
    act_group_aware: bool = True
    damping: Damping = "auto"
    signed_scales: bool = True
    polish: bool = True

    def group_size_of(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def batch_key(self, columns: int) -> tuple[float, Damping, tuple[str, int]]:
        """Variants with equal keys share a factorization, and are solved side by side."""
        return self.damp_percent, self.damping, self.order_key(columns)

    def order_key(self, columns: int) -> tuple[str, int]:
        """Key of the column order."""
        if self.desc_act:
            return "activation", 0
        if self.act_group_aware:
            # with one group per row, group-aware order equals plain act-order
            size = self.group_size_of(columns)
            return ("activation", 0) if size == columns else ("group_aware", size)
        return "natural", 0

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.sym, self.mse, self.signed_scales and self.sym and self.mse)


@dataclass
class Solution:
    """A quantized weight, with facts about its solve.

    Attributes:
        codes: [N, K] uint8, columns in their natural order.
        scales: [G, N] float16. zeros: [G, N] uint8.
        g_idx: group of each column, [K] int32.
        row_error: tr((W - Q) H (W - Q)^T) split by rows, [N] float64, with H undamped.
        damp_percent: the damping that was used. damp_raised: whether it exceeds the requested one. damping: the rule
            that it followed; None if H was not factored.
        dead_columns: number of input channels that were always zero.
        fallback: None, or ``rtn`` if the weight was rounded to nearest instead.
        out_of_range: the share of each row's squared weights in groups whose scale would have to be smaller, or larger,
            than any of float16, [2, N] float64; None if there are none.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    row_error: torch.Tensor
    damp_percent: float
    damp_raised: bool
    dead_columns: int
    damping: Damping | None = None
    fallback: str | None = None
    out_of_range: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """The weight that a loader computes, [N, K] float32."""
        index = self.g_idx.long()
        scales, zeros = self.scales.float().t(), self.zeros.float().t()
        return scales[:, index] * (self.codes.float() - zeros[:, index])


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    variants: Sequence[GptqParameters],
    *,
    rtn_fallback: bool = False,
    kernel: Kernel | None = None,
    row_budget: int | None = None,
) -> list[Solution]:
    """Quantize ``weight`` [N, K] in every variant, from one ``hessian`` [K, K] in the same dtype.

    Variants that share damping and order share one factorization and are solved side by side.

    Args:
        rtn_fallback: round to nearest, instead of failing, if no damping makes H positive definite.
        kernel: the implementation of the inner loop; None selects the device's default.
        row_budget: bytes of the weight, over all variants, processed together; None selects the device's default.

    Raises:
        SolveError: the statistics are not finite, or H is not positive definite and no fallback is allowed.
    """
    solutions: dict[int, Solution] = {}
    kernel = kernel or kernel_of(weight.device, weight.dtype)
    columns = weight.shape[1]
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise SolveError("its input statistics are not finite")
    batches: dict[tuple[float, Damping, tuple[str, int]], list[int]] = {}
    for index, variant in enumerate(variants):
        batches.setdefault(variant.batch_key(columns), []).append(index)
    for (damp_percent, damping, order), members in batches.items():
        asked = [variants[index] for index in members]
        try:
            factor = factorize(hessian, damp_percent, _order(hessian, *order), damping)
        except SolveError:
            if not rtn_fallback:
                raise
            found = [round_to_nearest(weight, hessian, parameters) for parameters in asked]
        else:
            found = _solve_together(weight, _Problem(hessian, factor, kernel), asked, row_budget)
        for solution in found:
            solution.out_of_range = _out_of_range(weight, solution)
        solutions.update(zip(members, found, strict=True))
    return [solutions[index] for index in range(len(variants))]


def _order(hessian: torch.Tensor, kind: str, size: int) -> torch.Tensor | None:
    if kind == "activation":
        return activation_order(hessian)
    return group_aware_order(hessian, size) if kind == "group_aware" else None


def round_to_nearest(weight: torch.Tensor, hessian: torch.Tensor, parameters: GptqParameters) -> Solution:
    """Plain rounding to nearest on the same grid: the fallback, and the baseline of every comparison."""
    rows, columns = weight.shape
    size = parameters.group_size_of(columns)
    diagonal = hessian.diagonal()
    importance = diagonal + parameters.damp_percent * damping_rule(diagonal, parameters.damping)[1]
    scales, zeros = fit_groups(weight, importance, parameters.grid, size)
    g_idx = torch.arange(columns, device=weight.device) // size
    codes = parameters.grid.round(weight, scales[g_idx].t(), zeros[g_idx].t())
    solution = Solution(
        codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), g_idx.int(),
        torch.zeros(rows, dtype=torch.float64), 0.0, False, int((diagonal <= 0).sum()), fallback="rtn",
    )  # fmt: skip
    difference = weight - solution.dequantize().to(weight.dtype)
    solution.row_error = energy(difference, hessian)
    solution.out_of_range = _out_of_range(weight, solution)
    return solution


def _out_of_range(weight: torch.Tensor, solution: Solution) -> torch.Tensor | None:
    """See :attr:`Solution.out_of_range`."""
    sizes = solution.scales.abs()
    beyond = torch.stack([sizes <= HALF_TINY, sizes >= HALF_MAX])  # [2, G, N]
    if not bool(beyond.any()):
        return None
    largest = weight.abs().amax(dim=1, keepdim=True)
    squares = (weight / torch.where(largest > 0, largest, torch.ones_like(largest))).square().double()
    groups = squares.new_zeros(len(weight), beyond.shape[1]).index_add_(1, solution.g_idx.long(), squares)
    return ((groups * beyond.transpose(1, 2)).sum(dim=2) / groups.sum(dim=1).clamp(min=1.0)).cpu()


@dataclass(frozen=True)
class _Problem:
    """What a batch of variants shares: H, its factor, and the implementation of the inner loops."""

    hessian: torch.Tensor
    factor: Factor
    kernel: Kernel


def _solve_together(
    weight: torch.Tensor, problem: _Problem, variants: Sequence[GptqParameters], row_budget: int | None
) -> list[Solution]:
    """Solve variants that share a factorization, one slice of rows at a time."""
    rows, columns = weight.shape
    budget = row_budget or (GPU_ROW_BUDGET if weight.device.type == "cuda" else ROW_BUDGET)
    step = max(1, budget // (len(variants) * columns * weight.element_size()))
    slices = [_solve_rows(weight[start : start + step], problem, variants) for start in range(0, rows, step)]
    if len(slices) == 1:
        return slices[0]
    return [_joined([part[index] for part in slices]) for index in range(len(variants))]


def _joined(parts: Sequence[Solution]) -> Solution:
    first = parts[0]
    return Solution(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts], dim=1),
        torch.cat([part.zeros for part in parts], dim=1),
        first.g_idx,
        torch.cat([part.row_error for part in parts]),
        first.damp_percent, first.damp_raised, first.dead_columns, first.damping,
    )  # fmt: skip


def _solve_rows(weight: torch.Tensor, problem: _Problem, variants: Sequence[GptqParameters]) -> list[Solution]:
    columns, factor = weight.shape[1], problem.factor
    state, sizes = _prepare(weight, factor, variants, problem.kernel)
    # a group must not span two runs: its grid would be fitted before this run's errors reach its later columns
    run = max([OUTER, *(size for size in sizes if size < columns and size > OUTER and columns % OUTER)])
    solve_columns(state, run)
    found = []
    for index, size in enumerate(sizes):
        g_idx = torch.empty(columns, dtype=torch.int32, device=weight.device)
        g_idx[state.order] = state.groups[index].int()
        used, variant = columns // size, variants[index]
        rounded = Rounded(
            state.codes[index], state.scales[index, :used], state.zeros[index, :used], size, variant.grid.top,
            order=state.order if variant.desc_act is True else None, fit_zeros=not variant.sym,
        )  # fmt: skip
        if variant.polish:
            gains, rest = descend(weight, problem.hessian, factor.damping, rounded, kernel=problem.kernel)
        else:
            gains, rest = torch.zeros_like(state.squares[index]), weight - rounded.values()
        damped = (rest.double().square() @ factor.damping.double()[:, None])[:, 0]  # in float32 tiny rows are lost
        found.append(
            Solution(
                codes=rounded.codes,
                scales=rounded.scales.half(),
                zeros=rounded.zeros.to(torch.uint8),
                g_idx=g_idx,
                row_error=(state.squares[index] - gains - damped).clamp_(min=0).cpu(),
                damp_percent=factor.damp_percent,
                damp_raised=factor.raised,
                dead_columns=factor.dead_columns,
                damping=factor.rule,
            )
        )
    return found


def _prepare(
    weight: torch.Tensor, factor: Factor, variants: Sequence[GptqParameters], kernel: Kernel
) -> tuple[Columns, list[int]]:
    """The initial state of a solve, and each variant's group size."""
    rows, columns = weight.shape
    device, dtype, count = weight.device, weight.dtype, len(variants)
    order = factor.order if factor.order is not None else torch.arange(columns, device=device)
    sizes = [variant.group_size_of(columns) for variant in variants]
    most = max(columns // size for size in sizes)
    importance = factor.upper.diagonal().square().reciprocal()
    original = weight[:, order] if factor.order is not None else weight.contiguous()
    state = Columns(
        work=original.expand(count, rows, columns).clone(memory_format=torch.contiguous_format),
        upper=factor.upper,
        importance=importance,
        order=order,
        groups=torch.empty(count, columns, device=device, dtype=torch.int64),
        sizes=torch.zeros(count, dtype=torch.int64),
        scales=torch.ones(count, most, rows, device=device, dtype=dtype),
        zeros=torch.zeros(count, most, rows, device=device, dtype=dtype),
        grids=[variant.grid for variant in variants],
        codes=torch.empty(count, rows, columns, device=device, dtype=torch.uint8),
        squares=torch.zeros(count, rows, device=device, dtype=torch.float64),
        kernel=kernel,
    )
    in_place = torch.empty_like(importance)
    in_place[order] = importance
    for index, (variant, size) in enumerate(zip(variants, sizes, strict=True)):
        if variant.desc_act == "static":
            # groups and grids of the natural layout, fixed before the solve: g_idx stays trivial on disk
            state.groups[index] = order // size
            fixed = fit_groups(weight, in_place, variant.grid, size, kernel)
            state.scales[index, : columns // size], state.zeros[index, : columns // size] = fixed
        else:
            # grids are fitted when the solve reaches a group; group-aware order does not visit them by number
            in_solve = torch.arange(columns, device=device) // size
            state.groups[index] = in_solve if variant.desc_act else order[in_solve * size] // size
            state.sizes[index] = size
    return state, sizes
