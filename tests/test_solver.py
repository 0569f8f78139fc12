"""The GPTQ solver against a plain float64 reference written from the paper, and its odd cases."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import quantize.methods.gptq
from quantize.errors import SolveError
from quantize.methods.gptq import GptqParameters, Solution, round_to_nearest, solve

ROWS, COLUMNS = 8, 256
GRID = [
    GptqParameters(bits, group_size, desc_act, sym, 0.05, mse, aware, damping, signed, polish)
    for (bits, group_size, (desc_act, aware), sym, mse), (damping, signed, polish) in zip(
        itertools.product(
            (2, 3, 4, 8),
            (-1, 16, 32, 64, 128, 256),
            ((False, False), (False, True), (True, False), ("static", False)),
            (True, False),
            (False, True),
        ),
        # as many as divide no length of the lists before, so that all values meet
        itertools.cycle(
            [
                ("auto", True, True),
                ("own", False, True),
                ("mean", True, False),
                ("own", True, True),
                ("mean", False, True),
            ]
        ),
    )
]
ACROSS = [
    GptqParameters(bits, (-1, 16, 32)[place % 3], desc_act, sym, 0.05, mse, aware, signed_scales=place % 5 != 0)
    for place, (bits, (desc_act, aware), sym, mse) in enumerate(
        itertools.product(
            (2, 3, 4, 8),
            ((False, False), (False, True), (True, False), ("static", False)),
            (True, False),
            (False, True),
        )
    )
]  # fmt: skip
"""Everything but the group size in every combination, and each group size with each other value."""
REACHES = [1.0, *(1.08 - 0.03 * step for step in range(24))]


def problem(
    rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs whose channels differ in strength."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    inputs = draw(3 * columns, columns) @ (0.1 * draw(columns, columns) + torch.diag(0.2 + draw(columns).abs()))
    return (0.1 * draw(rows, columns)).to(dtype), (inputs.t() @ inputs).to(dtype)


def reference_grid(group: np.ndarray, costs: np.ndarray, asked: GptqParameters) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row: the whole range, or the one of those tried that costs least."""
    signs = (1, -1) if asked.signed_scales and asked.sym and asked.mse else (1,)
    tried = [
        (sign * scale, zero)
        for scale, zero in (
            range_grid(group, asked.bits, asked.sym, at) for at in (REACHES if asked.mse else REACHES[:1])
        )
        for sign in signs
    ]
    errors = []
    for scale, zero in tried:
        codes = np.clip(np.rint(group / scale[:, None]) + zero[:, None], 0, 2**asked.bits - 1)
        errors.append(((scale[:, None] * (codes - zero[:, None]) - group) ** 2 * costs).sum(axis=1))
    best = np.argmin(errors, axis=0)
    rows = np.arange(len(group))
    return np.array([scale for scale, _ in tried])[best, rows], np.array([zero for _, zero in tried])[best, rows]


def range_grid(group: np.ndarray, bits: int, sym: bool, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale (as float16 holds it) and zero point for a part of the range of weights with both signs."""
    top = 2**bits - 1
    low, high = reach * np.minimum(group.min(axis=1), 0), reach * np.maximum(group.max(axis=1), 0)
    if sym:
        scale = (2 * np.maximum(-low, high) / top).astype(np.float16).astype(np.float64)
        return scale, np.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / top).astype(np.float16).astype(np.float64)
    zero = np.rint(-low / scale)
    narrow = (high / (top - 1)).astype(np.float16).astype(np.float64)  # v1 files cannot hold zero point 0
    return np.where(zero < 1, narrow, scale), np.clip(zero, 1, top)


def reference_order(diagonal: np.ndarray, size: int, asked: GptqParameters) -> list[int]:
    """Columns in solve order: natural, act-order, or groups and then their columns by activation."""
    columns = range(len(diagonal))
    if asked.desc_act:
        return sorted(columns, key=lambda column: -diagonal[column])
    if not asked.act_group_aware:
        return list(columns)
    strongest = [max(diagonal[at : at + size]) for at in range(0, len(diagonal), size)]
    return sorted(columns, key=lambda column: (-strongest[column // size], column // size, -diagonal[column]))


def reference_damping(diagonal: np.ndarray, asked: GptqParameters) -> np.ndarray:
    """What is added to the diagonal."""
    massive = diagonal.max() > 50 * np.sort(diagonal)[(len(diagonal) - 1) // 2]
    own = asked.damping == "own" or (asked.damping == "auto" and massive)
    mean = np.full_like(diagonal, diagonal.mean())
    return asked.damp_percent * (diagonal + 0.01 * mean if own else mean)


def reference_polish(
    weight: np.ndarray,
    damped: np.ndarray,
    rounded: tuple[np.ndarray, ...],
    asked: GptqParameters,
    places: list[list[int]],
) -> None:
    """The descent, step by step, each from the error that it finds; ``places`` are the columns of each group."""
    codes, scales, zeros = rounded
    top = 2**asked.bits - 1
    rest = weight - values_of(codes, scales, zeros, places)
    for sweep in range(2):
        for group, columns in enumerate(places):
            inside = damped[np.ix_(columns, columns)]
            if sweep == 0:
                scale, zero = scales[group], zeros[group]
                apart = codes[:, columns] - zero[:, None]
                slope, bend = (apart * (rest @ damped[:, columns])).sum(axis=1), ((apart @ inside) * apart).sum(axis=1)
                better = (scale + slope / np.where(bend > 0, bend, 1)).astype(np.float16).astype(np.float64)
                by = better - scale
                taken = (bend > 0) & (better * scale > 0) & (2 * by * slope - by**2 * bend > 0)
                scales[group] = np.where(taken, better, scale)
                rest[:, columns] -= np.where(taken, by, 0)[:, None] * apart
                if not asked.sym:
                    scale, slope, bend = scales[group], (rest @ damped[:, columns]).sum(axis=1), inside.sum()
                    better = np.clip(np.rint(zero - slope / bend / scale), 1, top)
                    by = scale * (zero - better)
                    taken = 2 * by * slope - by**2 * bend > 0
                    zeros[group] = np.where(taken, better, zero)
                    rest[:, columns] -= np.where(taken, by, 0)[:, None]
            for column in columns:
                slope, bend, code = rest @ damped[:, column], damped[column, column], codes[:, column]
                better = np.rint(np.clip(code + slope / bend / scales[group], 0, top))
                by = scales[group] * (better - code)
                taken = 2 * by * slope - by**2 * bend > 0
                codes[:, column] = np.where(taken, better, code)
                rest[:, column] -= np.where(taken, by, 0)


def values_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, places: list[list[int]]) -> np.ndarray:
    """The weight that is stored."""
    values = np.empty_like(codes, dtype=np.float64)
    for group, columns in enumerate(places):
        values[:, columns] = scales[group][:, None] * (codes[:, columns] - zeros[group][:, None])
    return values


def reference(weight: np.ndarray, hessian: np.ndarray, asked: GptqParameters) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper, column by column, and the descent: codes [N, K] and the group of each column."""
    rows, columns = weight.shape
    size = columns if asked.group_size == -1 else asked.group_size
    order = reference_order(np.diag(hessian), size, asked)
    damped = hessian + np.diag(reference_damping(np.diag(hessian), asked))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    work = weight[:, order].copy()
    codes, g_idx = np.zeros((rows, columns), int), np.zeros(columns, int)
    scales, zeros = (np.zeros((columns // size, rows)) for _ in range(2))
    costs = 1 / np.diag(upper) ** 2
    in_place = costs[np.argsort(order)]
    fixed = [
        reference_grid(weight[:, at : at + size], in_place[at : at + size], asked) for at in range(0, columns, size)
    ]
    for step, column in enumerate(order):
        group = step // size if asked.desc_act is True else column // size
        if asked.desc_act == "static":
            scale, zero = fixed[group]
        elif step % size == 0:
            scale, zero = reference_grid(work[:, step : step + size], costs[step : step + size], asked)
        scales[group], zeros[group] = scale, zero
        code = np.rint(np.clip(work[:, step] / scale + zero, 0, 2**asked.bits - 1))
        error = (work[:, step] - scale * (code - zero)) / upper[step, step]
        work[:, step + 1 :] -= np.outer(error, upper[step, step + 1 :])
        codes[:, column], g_idx[column] = code, group
    if asked.polish:
        visited = order if asked.desc_act is True else list(range(columns))
        places = [visited[at : at + size] for at in range(0, columns, size)]
        reference_polish(weight, damped, (codes, scales, zeros), asked, places)
    return codes, g_idx


def error_of(weight: torch.Tensor, hessian: torch.Tensor, solution: Solution) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row, in float64."""
    difference = weight.double() - solution.dequantize().double()
    return ((difference @ hessian.double()) * difference).sum(dim=1)


def equal(left: Solution, right: Solution) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("codes", "scales", "zeros", "g_idx"))


@pytest.fixture(scope="module")
def solved() -> list[Solution]:
    weight, hessian = problem()
    return solve(weight, hessian, GRID)


@pytest.fixture(scope="module")
def references() -> list[tuple[np.ndarray, np.ndarray]]:
    weight, hessian = problem()
    return [reference(weight.numpy(), hessian.numpy(), asked) for asked in GRID]


def test_codes_equal_the_references_in_float64(
    solved: list[Solution], references: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    for asked, solution, (codes, g_idx) in zip(GRID, solved, references, strict=True):
        assert np.array_equal(solution.codes.numpy(), codes), asked
        assert np.array_equal(solution.g_idx.numpy(), g_idx), asked


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.full)])
def test_codes_equal_the_references_in_float32_but_for_near_ties(
    references: list[tuple[np.ndarray, np.ndarray]], step: int
) -> None:
    """Each fifth: a step that divides no length of the grid's lists, so that all values meet."""
    weight, hessian = problem(dtype=torch.float32)
    some = GRID[::step]
    differing = 0  # rows; a tie that falls the other way moves the rest of its row
    for asked, solution, (codes, g_idx) in zip(some, solve(weight, hessian, some), references[::step], strict=True):
        assert np.array_equal(solution.g_idx.numpy(), g_idx), asked
        differing += int((solution.codes.numpy() != codes).any(axis=1).sum())
    assert differing <= 0.03 * len(some) * ROWS


@pytest.mark.parametrize("group_sizes", [None, pytest.param((-1, 16, 32), marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_kernel_and_torch_give_equal_codes(dtype: torch.dtype, group_sizes: tuple[int, ...] | None) -> None:
    weight, hessian = problem(6, 160, dtype)
    variants = ACROSS
    if group_sizes:
        variants = [replace(asked, group_size=size) for asked, size in itertools.product(ACROSS, group_sizes)]
    compiled = solve(weight, hessian, variants, kernel="numba")
    plain = solve(weight, hessian, variants, kernel="torch")
    assert all(map(equal, compiled, plain))


def test_row_error_is_the_error_of_the_output(solved: list[Solution]) -> None:
    weight, hessian = problem()
    for asked, solution in zip(GRID, solved, strict=True):
        true = error_of(weight, hessian, solution)
        assert torch.allclose(solution.row_error, true, rtol=1e-4, atol=1e-6 * float(true.max())), asked


def test_error_is_smaller_than_with_rounding_to_nearest(solved: list[Solution]) -> None:
    weight, hessian = problem()
    for asked, solution in zip(GRID, solved, strict=True):
        nearest = round_to_nearest(weight, hessian, asked)
        assert error_of(weight, hessian, solution).sum() < error_of(weight, hessian, nearest).sum(), asked


def test_act_order_helps_where_channels_differ_in_strength() -> None:
    weight, hessian = problem(32, 256)
    plain, ordered = solve(weight, hessian, [GptqParameters(3, 64, False), GptqParameters(3, 64, True)])
    assert ordered.row_error.sum() < plain.row_error.sum()


def test_one_group_of_all_columns_is_the_same_as_no_groups() -> None:
    weight, hessian = problem()
    for desc_act in (False, True, "static"):
        whole, none = solve(weight, hessian, [GptqParameters(4, COLUMNS, desc_act), GptqParameters(4, -1, desc_act)])
        assert equal(whole, none)


def test_variants_solved_together_equal_variants_solved_alone(solved: list[Solution]) -> None:
    weight, hessian = problem()
    for index in range(0, len(GRID), 7):
        (alone,) = solve(weight, hessian, [GRID[index]])
        assert equal(alone, solved[index]), GRID[index]


def test_variants_of_different_damping_stay_apart() -> None:
    weight, hessian = problem()
    asked = [GptqParameters(3, 32, damp_percent=damp) for damp in (0.01, 0.9)]
    together = solve(weight, hessian, asked)
    assert [solution.damp_percent for solution in together] == [0.01, 0.9]
    assert not torch.equal(together[0].codes, together[1].codes)
    assert all(equal(solve(weight, hessian, [one])[0], two) for one, two in zip(asked, together, strict=True))


def test_slices_of_rows_give_what_the_whole_gives(solved: list[Solution], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    few = range(0, len(GRID), 9)
    monkeypatch.setattr(quantize.methods.gptq, "ROW_BUDGET", 3 * COLUMNS * 8)  # of one variant at most three rows
    sliced = solve(weight, hessian, [GRID[index] for index in few])
    for index, solution in zip(few, sliced, strict=True):
        assert equal(solution, solved[index])
        assert torch.allclose(solution.row_error, solved[index].row_error)


@pytest.mark.parametrize(("columns", "group_sizes"), [(96, (-1, 32)), (160, (16, 32)), (576, (64,))])
def test_widths_that_are_no_multiple_of_128(columns: int, group_sizes: tuple[int, ...]) -> None:
    weight, hessian = problem(4, columns)
    variants = [
        GptqParameters(4, group_size, desc_act, sym=bool(desc_act))
        for group_size in group_sizes
        for desc_act in (False, True, "static")
    ]
    for asked, solution in zip(variants, solve(weight, hessian, variants), strict=True):
        codes, g_idx = reference(weight.numpy(), hessian.numpy(), asked)
        assert np.array_equal(solution.codes.numpy(), codes), asked
        assert np.array_equal(solution.g_idx.numpy(), g_idx), asked


# -- grids


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_search_is_not_worse_on_heavy_tailed_weights(bits: int, sym: bool) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(16, 256)))
    hessian = torch.diag(torch.linspace(0.5, 2, 256, dtype=torch.float64))

    def distance(mse: bool) -> torch.Tensor:
        solution = round_to_nearest(weight, hessian, GptqParameters(bits, 64, sym=sym, mse=mse))
        importance = hessian.diagonal() + 0.1 * hessian.diagonal().mean()  # by what the search minimizes
        cost = (weight - solution.dequantize()).square() * importance
        return cost.view(16, -1, 64).sum(dim=2)

    plain, searched = distance(False), distance(True)
    assert bool((searched <= plain * (1 + 1e-9)).all())
    assert searched.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_ranges_lower_the_error_of_the_output(bits: int, sym: bool) -> None:
    _, hessian = problem()
    weight = torch.from_numpy(0.1 * np.random.default_rng(0).standard_t(4, size=(64, COLUMNS)))  # tails as real ones
    orders = [replace(GptqParameters(bits, 64, sym=sym), desc_act=order) for order in (False, True, "static")]
    searched = solve(weight, hessian, orders)
    whole = solve(weight, hessian, [replace(order, mse=False) for order in orders])
    for one, other in zip(searched, whole, strict=True):
        assert one.row_error.sum() < other.row_error.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_asymmetric_zero_points_are_never_zero(bits: int, shift: float) -> None:
    weight, hessian = problem(8, 128)
    variants = [
        GptqParameters(bits, 32, desc_act, sym=False, mse=mse)
        for desc_act in (False, True, "static")
        for mse in (False, True)
    ]
    for solution in solve(weight + shift * 0.1, hessian, variants):
        assert int(solution.zeros.min()) >= 1
        assert int(solution.zeros.max()) <= 2**bits - 1


@pytest.mark.parametrize("sym", [True, False])
def test_rows_of_zeros_stay_zero_beside_other_rows(sym: bool) -> None:
    weight, hessian = problem(8, 128)
    weight[3] = 0
    weight[5, 32:64] = 0
    (solution,) = solve(weight, hessian, [GptqParameters(4, 32, "static", sym)])
    assert not solution.dequantize()[3].any()
    assert torch.isfinite(solution.scales).all()
    assert error_of(weight, hessian, solution).sum() < 0.05 * ((weight @ hessian) * weight).sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_are_covered_by_an_asymmetric_grid(sign: int) -> None:
    weight, hessian = problem(8, 128)
    weight = sign * (weight.abs() + 0.05)
    (solution,) = solve(weight, hessian, [GptqParameters(8, 32, sym=False)])
    span = weight.abs().max()
    assert float((weight - solution.dequantize()).abs().max()) < float(span) / 50


# -- Hessians as they should not be


def test_dead_columns_are_rounded_to_nearest_and_recorded() -> None:
    weight, hessian = problem(8, 128)
    dead = torch.tensor([0, 17, 64, 127])
    hessian[dead], hessian[:, dead] = 0, 0
    variants = [GptqParameters(3, group_size, d) for group_size in (-1, 32) for d in (False, True, "static")]
    for asked, solution in zip(variants, solve(weight, hessian, variants), strict=True):
        index = solution.g_idx.long()[dead]
        nearest = torch.round(weight[:, dead] / solution.scales.double().t()[:, index]) + 4
        assert torch.equal(solution.codes[:, dead].double(), nearest.clamp(0, 7)), asked
        assert solution.dead_columns == 4
        assert not solution.damp_raised
        assert torch.allclose(solution.row_error, error_of(weight, hessian, solution), rtol=1e-4), asked


def test_a_hessian_of_nothing_but_zeros_rounds_to_nearest() -> None:
    weight, hessian = problem(8, 128)
    asked = GptqParameters(4, 32, polish=False)
    (solution,) = solve(weight, torch.zeros_like(hessian), [asked])
    assert equal(solution, round_to_nearest(weight, torch.zeros_like(hessian), asked))
    assert solution.dead_columns == 128
    assert float(solution.row_error.max()) < 1e-12


def indefinite(columns: int, coupling: float) -> torch.Tensor:
    """Ones on the diagonal, ``coupling`` beside it: smallest eigenvalue 1 - coupling."""
    return coupling * torch.ones(columns, columns).double() + (1 - coupling) * torch.eye(columns).double()


@pytest.mark.parametrize("desc_act", [False, True])
def test_damping_is_raised_as_far_as_needed_and_recorded(desc_act: bool) -> None:
    weight, _ = problem(8, 64)
    (mild,) = solve(weight, indefinite(64, 1.5), [GptqParameters(4, 32, desc_act, damp_percent=0.01)])
    (hard,) = solve(weight, indefinite(64, 5.0), [GptqParameters(4, 32, desc_act, damp_percent=0.01)])
    assert mild.damp_raised
    assert hard.damp_raised
    assert mild.damp_percent == pytest.approx(1.0)
    assert hard.damp_percent == pytest.approx(10.0)


def test_no_damping_at_all_is_raised_from_nothing() -> None:
    weight, _ = problem(8, 64)
    (solution,) = solve(weight, indefinite(64, 1.5), [GptqParameters(4, 32, damp_percent=0.0)])
    assert solution.damp_raised
    assert solution.damp_percent > 0.5


def test_damping_that_suffices_is_not_raised(solved: list[Solution]) -> None:
    assert not any(solution.damp_raised for solution in solved)
    assert {solution.damp_percent for solution in solved} == {0.05}


def test_a_hessian_beyond_all_damping_fails_or_falls_back_as_asked() -> None:
    weight, _ = problem(8, 64)
    hessian, asked = indefinite(64, 20.0), GptqParameters(4, 32, True)
    with pytest.raises(SolveError, match="not positive definite"):
        solve(weight, hessian, [asked])
    (solution,) = solve(weight, hessian, [asked], rtn_fallback=True)
    assert solution.fallback == "rtn"
    assert equal(solution, round_to_nearest(weight, hessian, asked))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (3, 9)])
def test_statistics_that_are_not_finite_fail(value: float, place: tuple[int, int]) -> None:
    weight, hessian = problem(8, 64)
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(SolveError):
        solve(weight, hessian, [GptqParameters(4, 32)])


def test_rounding_to_nearest_leaves_at_most_half_a_step() -> None:
    weight, hessian = problem()
    solution = round_to_nearest(weight, hessian, GptqParameters(4, 32, sym=False, mse=False))
    step = solution.scales.double().t()[:, solution.g_idx.long()]
    # the ends of the range are a little further off: zero point and scale are themselves rounded
    assert bool(((weight - solution.dequantize()).abs() <= 1.01 * step).all())
    assert float(((weight - solution.dequantize()).abs() <= 0.501 * step).double().mean()) > 0.95
    assert torch.allclose(solution.row_error, error_of(weight, hessian, solution), rtol=1e-4)
