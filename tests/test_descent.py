"""The descent after a solve, and solves onto grids that are given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_solver import problem

import quantize.methods.fixed_grid
from quantize.methods.descent import Rounded, descend
from quantize.methods.fixed_grid import FixedGrid, prepare, round_onto
from quantize.methods.gptq import GptqParameters, solve
from quantize.methods.solve_state import Kernel

KERNELS: tuple[Kernel, ...] = ("numba", "torch")
CODEBOOK = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
"""The levels of llama.cpp's IQ4 types."""


def nearest(weight: torch.Tensor, group_size: int, top: int, sym: bool) -> Rounded:
    """Rounded to nearest over each group's range."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = (2 * torch.maximum(-low, high) / top if sym else (high - low) / top).half().to(weight.dtype)
    zeros = torch.full_like(scales, (top + 1) // 2) if sym else (-low / scales).round().clamp(1, top)
    codes = (groups / scales[:, :, None] + zeros[:, :, None]).clamp(0, top).round()
    return Rounded(
        codes.view_as(weight).to(torch.uint8), scales.t().contiguous(), zeros.t().contiguous(), group_size, top,
        fit_zeros=not sym,
    )  # fmt: skip


def damped_error(weight: torch.Tensor, hessian: torch.Tensor, rounded: Rounded) -> torch.Tensor:
    rest = weight - rounded.values()
    return ((rest @ hessian) * rest).sum(dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("group_size", "top", "sym"), [(16, 3, True), (64, 7, False), (160, 15, True), (320, 255, False)]
)
def test_no_sweep_raises_the_error_of_a_row_and_gains_are_what_it_falls_by(
    group_size: int, top: int, sym: bool, kernel: Kernel
) -> None:
    weight, hessian = problem(70, 320)
    damping = 0.1 * hessian.diagonal()
    damped = hessian + torch.diag(damping)
    before, last = damped_error(weight, damped, nearest(weight, group_size, top, sym)), None
    for sweeps in (1, 2, 4):
        rounded = nearest(weight, group_size, top, sym)
        gains, rest = descend(weight, hessian, damping, rounded, sweeps=sweeps, kernel=kernel)
        after = damped_error(weight, damped, rounded)
        assert torch.allclose(rest, weight - rounded.values())
        assert torch.allclose(before - after, gains, rtol=1e-6, atol=1e-9 * float(before.max()))
        assert bool((after <= (before if last is None else last) * (1 + 1e-12)).all())
        assert bool((rounded.zeros >= (1 if not sym else (top + 1) // 2)).all())
        assert bool((rounded.zeros <= (top if not sym else (top + 1) // 2)).all())
        assert torch.equal(rounded.scales, rounded.scales.half().double())
        last = after
    assert last is not None
    assert float(last.sum()) < 0.9 * float(before.sum())


def test_polish_lowers_the_error_of_every_kind_of_solve() -> None:
    weight, hessian = problem(32, 256)
    for asked in (GptqParameters(4, 64), GptqParameters(3, 32, True), GptqParameters(2, -1, "static", sym=False)):
        with_it, without = solve(weight, hessian, [asked, replace(asked, polish=False)])
        assert float(with_it.row_error.sum()) < 0.97 * float(without.row_error.sum()), asked


def test_a_negative_scale_is_taken_where_weights_reach_farther_above() -> None:
    """Four levels, one of them above zero: {-1, 0, 1, 2} holds what {-2, -1, 0, 1} cannot."""
    weight = torch.tensor([[-1.0, 0, 1, 2] * 4, [1.0, 0, -1, -2] * 4])
    signed, unsigned = solve(
        weight, torch.eye(16) + 0.01, [GptqParameters(2, 16), GptqParameters(2, 16, signed_scales=False)]
    )
    assert signed.scales[0].sign().tolist() == [-1, 1]
    assert torch.equal(signed.dequantize(), weight)
    assert bool((unsigned.scales > 0).all())
    assert not torch.equal(unsigned.dequantize()[0], weight[0])


def test_massive_channels_are_damped_by_their_own_diagonal() -> None:
    weight, hessian = problem(8, 128)
    massive = torch.ones(128, dtype=torch.float64)
    massive[5] = 30
    strong = hessian * massive * massive[:, None]
    asked = [GptqParameters(4, 32, damping=rule) for rule in ("auto", "own", "mean")]
    auto, own, mean = solve(weight, strong, asked)
    assert [solution.damping for solution in (auto, own, mean)] == ["own", "own", "mean"]
    assert torch.equal(auto.codes, own.codes)
    assert not torch.equal(own.codes, mean.codes)
    assert solve(weight, hessian, asked[:1])[0].damping == "mean"


# -- grids that are given


def given(random: torch.Generator, levels: torch.Tensor | None, lowest: int, highest: int) -> FixedGrid:
    """Scales of both signs and of zero, offsets that are no multiple of them."""
    scales = 0.02 * torch.randn(8, 70, generator=random) / (1 if levels is None else 8)
    scales[2, :9] = 0
    offsets = torch.zeros(8, 70) if levels is not None else 0.05 * torch.rand(8, 70, generator=random)
    return FixedGrid(scales, offsets, 32, lowest, highest, levels)


@pytest.mark.parametrize(
    ("levels", "lowest", "highest"), [(None, 0, 3), (None, -8, 7), (None, -128, 127), (CODEBOOK, 0, 15)]
)
def test_round_onto_beats_rounding_and_kernels_agree(
    levels: torch.Tensor | None, lowest: int, highest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem(70, 256, torch.float32)
    grid = given(torch.Generator().manual_seed(1), levels, lowest, highest)
    prepared = prepare(hessian)

    def error(codes: torch.Tensor) -> float:
        rest = weight - grid.values(codes)
        return float(((rest @ hessian) * rest).sum())

    candidates = torch.stack([grid.values(torch.full((70, 256), code)) for code in range(lowest, highest + 1)])
    rounded = (candidates - weight).abs().argmin(dim=0).to(torch.int16) + lowest
    once, polished = (round_onto(weight, prepared, grid, sweeps=sweeps) for sweeps in (0, 2))
    assert int(polished.min()) >= lowest
    assert int(polished.max()) <= highest
    assert error(polished) < error(once) < error(rounded)

    monkeypatch.setattr(quantize.methods.fixed_grid, "kernel_of", lambda *_: "torch")
    differing = (round_onto(weight, prepared, grid) != polished).any(dim=1)  # rows; a near tie moves the rest of one
    assert int(differing.sum()) <= 3


def test_a_scale_of_zero_leaves_the_offset() -> None:
    weight, hessian = problem(4, 64, torch.float32)
    grid = FixedGrid(torch.zeros(2, 4), torch.tensor([[0.5] * 4, [0.0] * 4]), 32, 0, 15)
    values = grid.values(round_onto(weight, prepare(hessian), grid))
    assert torch.equal(values, torch.cat([torch.full((4, 32), -0.5), torch.zeros(4, 32)], dim=1))
