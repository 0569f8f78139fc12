"""The solver at its edges: slices of rows, the ends of float16, odd statistics; and what must not change a code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_solver import error_of, indefinite, problem, range_grid

from quantize.errors import SolveError
from quantize.methods.columns import Kernel, fit_groups
from quantize.methods.gptq import GptqParameters, Solution, round_to_nearest, solve
from quantize.methods.grid import HALF_MAX, HALF_TINY, Grid

KERNELS: tuple[Kernel, ...] = ("numba", "torch")
ORDERS = [
    GptqParameters(4, 16, sym=False, act_group_aware=False),
    GptqParameters(3, 32, sym=False),
    GptqParameters(4, 32, True, sym=False),
    GptqParameters(3, -1, True, mse=False),
    GptqParameters(2, 16, "static", sym=False),
]
"""One of each order, with zero points of their own where they can have them."""


def same(one: Solution, other: Solution) -> bool:
    names = ("codes", "scales", "zeros", "g_idx")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


# -- slices of rows: every real layer is solved in several


@pytest.mark.parametrize(("rows_at_once", "kernel"), [(0, "numba"), (4, "numba"), (10, "numba"), (4, "torch")])
def test_slices_of_rows_join_to_the_whole(rows_at_once: int, kernel: Kernel) -> None:
    """A budget below one row (0) takes one row at a time; 10 leaves a slice of one row at the end."""
    weight, hessian = problem(11, 64)
    weight += 0.04 * torch.arange(11)[:, None] - 0.2  # zero points that differ from row to row
    for asked in ORDERS:
        (whole,) = solve(weight, hessian, [asked], kernel=kernel)
        budget = rows_at_once * 64 * weight.element_size() or 1
        (sliced,) = solve(weight, hessian, [asked], kernel=kernel, row_budget=budget)
        assert same(sliced, whole), asked
        assert torch.allclose(sliced.row_error, whole.row_error, rtol=1e-9), asked
        for name in ("damp_percent", "damp_raised", "dead_columns", "fallback"):
            assert getattr(sliced, name) == getattr(whole, name)


def test_variants_of_one_factorization_are_sliced_together() -> None:
    weight, hessian = problem(13, 64)
    variants = [GptqParameters(bits, 32, True, sym=sym) for bits in (2, 3, 4, 8) for sym in (True, False)]
    whole = solve(weight, hessian, variants)
    sliced = solve(weight, hessian, variants, row_budget=5 * len(variants) * 64 * weight.element_size())
    assert all(map(same, sliced, whole))


# -- the ledger's figures


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_row_has_a_negative_error(kernel: Kernel) -> None:
    """With H nothing but damping, a row's error is a difference of two equal sums, which float32 rounds either way."""
    weight, _ = problem(64, 64, torch.float32)
    (solution,) = solve(weight, torch.zeros(64, 64), [GptqParameters(3, 32)], kernel=kernel)
    assert float(solution.row_error.min()) == 0
    assert float(solution.row_error.max()) < 1e-6


def test_rounding_to_nearest_counts_the_dead_columns() -> None:
    weight, _ = problem(8, 64)
    hessian = indefinite(64, 20.0)
    dead = torch.tensor([0, 9, 63])
    hessian[dead], hessian[:, dead] = 0, 0
    (solution,) = solve(weight, hessian, [GptqParameters(4, 32)], rtn_fallback=True)
    assert (solution.fallback, solution.dead_columns) == ("rtn", 3)
    (solved,) = solve(weight, hessian.abs().minimum(torch.eye(64)), [GptqParameters(4, 32)])
    assert (solved.fallback, solved.dead_columns) == (None, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_that_are_not_finite_are_called_so(value: float) -> None:
    weight, hessian = problem(8, 64)
    hessian[3, 3] = value
    for fallback in (False, True):  # rounding to nearest would hide it
        with pytest.raises(SolveError, match="its input statistics are not finite"):
            solve(weight, hessian, [GptqParameters(4, 32)], rtn_fallback=fallback)


# -- grids at the ends of what float16 and the codes hold


def fitted(weights: torch.Tensor, grid: Grid, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row, as one group."""
    scales, zeros = fit_groups(
        weights, torch.ones(weights.shape[1], dtype=weights.dtype), grid, len(weights[0]), kernel
    )
    return scales[0], zeros[0]


def exact_half(value: float) -> float:
    return float(np.clip(np.float64(value), HALF_TINY, HALF_MAX).astype(np.float16))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_scales_of_the_tiniest_and_of_the_largest_weights_are_float16s(
    sym: bool, mse: bool, dtype: torch.dtype, kernel: Kernel
) -> None:
    """From half the smallest subnormal number to far beyond the largest: rounded as float16 is, clamped at its ends."""
    steps = torch.tensor([2.0**-26, 2.0**-24, 1.4 * 2.0**-24, 2.6 * 2.0**-24, 13.5 * 2.0**-24, 2.0**-15, 2.0**-14,
                          1.0, 60_100.0, 65_000.0, 65_504.0, 70_000.0, 1e6], dtype=dtype)  # fmt: skip
    codes = torch.arange(-7.5, 8) if sym else torch.arange(-8.0, 8)
    weights = steps[:, None] * codes.to(dtype)
    scales, zeros = fitted(weights, Grid(4, sym, mse), kernel)
    assert torch.equal(scales, scales.half().to(dtype))
    if not mse:
        assert torch.equal(scales, torch.tensor([exact_half(float(step)) for step in steps], dtype=dtype))
        assert torch.equal(zeros, torch.full_like(zeros, 8) if sym else (8 * steps / scales).round().clamp(1, 15))
    else:  # the search may do better than the whole range, never by leaving float16
        assert bool((scales >= HALF_TINY).all())
        assert bool((scales <= HALF_MAX).all())
        assert float(scales[-1]) == HALF_MAX


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [-1, 1], ids=["negative", "positive"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_of_one_sign_reach_to_zero(bits: int, sign: int, kernel: Kernel) -> None:
    """A range is taken with zero in it, so that the zero point is a code."""
    weight, hessian = problem(8, 64)
    weight = sign * (weight.abs() + 0.3)
    asked = GptqParameters(bits, 32, "static", sym=False, mse=False, polish=False)
    (solution,) = solve(weight, hessian, [asked], kernel=kernel)
    for group in range(2):
        scale, zero = range_grid(weight[:, 32 * group : 32 * group + 32].numpy(), bits, False, 1.0)
        assert np.array_equal(solution.scales[group].double().numpy(), scale)
        assert np.array_equal(solution.zeros[group].numpy(), zero)
    assert set(solution.zeros.unique().tolist()) == {2**bits - 1 if sign < 0 else 1}
    (natural,) = solve(weight, hessian, [replace(asked, desc_act=False, mse=True)], kernel=kernel)
    apart = (weight - natural.dequantize()).abs().max()
    assert float(apart) < 2 * float(natural.scales.max())


def test_kernels_agree() -> None:
    """On rows of both signs, of one sign, and of nothing, more of them than the compiled kernel walks at once."""
    weight, hessian = problem(70, 64, torch.float32)
    weight[1], weight[2], weight[3, 16:32] = -weight[1].abs() - 0.1, weight[2].abs() + 0.1, 0
    compiled, plain = (solve(weight, hessian, ORDERS, kernel=kernel) for kernel in KERNELS)
    for asked, one, other in zip(ORDERS, compiled, plain, strict=True):
        assert same(one, other), asked
        assert torch.allclose(one.row_error, error_of(weight.double(), hessian.double(), one), rtol=1e-3), asked


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_group_has_a_scale_that_divides(kernel: Kernel) -> None:
    scales, _ = fitted(torch.zeros(3, 16), Grid(4), kernel)
    assert torch.equal(scales, torch.ones(3))


# -- what a change of the problem does to its answer


@pytest.mark.parametrize("factor", [2.0, 0.5, 3.0])
def test_more_of_the_same_statistics_change_no_code(factor: float) -> None:
    weight, hessian = problem(16, 96)
    for one, other in zip(solve(weight, hessian, ORDERS), solve(weight, factor * hessian, ORDERS), strict=True):
        assert same(one, other)
        assert torch.allclose(other.row_error, factor * one.row_error, rtol=1e-9)
        assert other.damp_percent == one.damp_percent


@pytest.mark.parametrize("exponent", [-3, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_times_a_power_of_two_have_scales_times_it(exponent: int, dtype: torch.dtype) -> None:
    weight, hessian = problem(16, 96, dtype)
    weight += 0.05
    factor = 2.0**exponent
    for one, other in zip(solve(weight, hessian, ORDERS), solve(factor * weight, hessian, ORDERS), strict=True):
        assert torch.equal(other.codes, one.codes)
        assert torch.equal(other.zeros, one.zeros)
        assert torch.equal(other.scales.float(), factor * one.scales.float())
        assert torch.allclose(other.row_error, factor**2 * one.row_error, rtol=1e-9)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_permuted_columns_have_permuted_codes_under_act_order(bits: int, group_size: int) -> None:
    weight, hessian = problem(16, 96)
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(4))
    asked = GptqParameters(bits, group_size, True, sym=False)
    (one,) = solve(weight, hessian, [asked])
    (other,) = solve(weight[:, shuffled], hessian[shuffled][:, shuffled], [asked])
    assert torch.equal(other.codes, one.codes[:, shuffled])
    assert torch.equal(other.g_idx, one.g_idx[shuffled])
    assert torch.equal(other.scales, one.scales)
    assert torch.equal(other.zeros, one.zeros)


def test_permuted_groups_have_permuted_codes_in_group_aware_order() -> None:
    weight, hessian = problem(16, 96)
    groups = torch.tensor([2, 0, 1])
    shuffled = torch.cat([32 * group + torch.randperm(32, generator=torch.manual_seed(4)) for group in groups])
    asked = GptqParameters(4, 32, sym=False, polish=False)  # the descent goes from the first column to the last
    (one,) = solve(weight, hessian, [asked])
    (other,) = solve(weight[:, shuffled], hessian[shuffled][:, shuffled], [asked])
    assert torch.equal(other.codes, one.codes[:, shuffled])
    assert torch.equal(other.scales, one.scales[groups])
    assert torch.equal(other.zeros, one.zeros[groups])


def test_a_row_is_solved_as_if_it_were_alone() -> None:
    weight, hessian = problem(70, 64)  # more than the compiled kernel walks at once
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    for asked in ORDERS:
        (one,), (other,) = solve(weight, hessian, [asked]), solve(weight[order], hessian, [asked])
        assert torch.equal(other.codes, one.codes[order])
        assert torch.equal(other.scales, one.scales[:, order])
        assert torch.equal(other.zeros, one.zeros[:, order])


def test_a_weight_on_its_grid_comes_back_whole() -> None:
    """Codes of every value times one float16 scale: rounding to nearest, and the solve, have nothing to lose."""
    codes = torch.stack([torch.arange(16), torch.arange(16).flip(0)]).repeat(1, 4).double()
    weight = 0.0625 * (codes - 8)
    _, hessian = problem(8, 64)
    for asked in (GptqParameters(4, 16, sym=False, mse=False), GptqParameters(4, 16, sym=False)):
        for solution in (round_to_nearest(weight, hessian, asked), *solve(weight, hessian, [asked])):
            assert torch.equal(solution.codes.double(), codes)
            assert torch.equal(solution.dequantize().double(), weight)
            assert float(error_of(weight, hessian, solution).abs().max()) == 0
