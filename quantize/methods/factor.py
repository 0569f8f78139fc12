"""The Cholesky factor of the inverse Hessian that GPTQ uses, with damping raised where necessary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quantize.errors import SolveError
from quantize.methods.sums import mean
from quantize.methods.triangular import invert_factor

Damping = Literal["auto", "own", "mean"]
"""What is added to each channel's diagonal: a share of its own value, or of the mean of all; by default the own where
massive channels own the mean."""

RAISE_BY = 10.0
DAMP_LIMIT = 10.0
FLOOR = 0.01  # of the mean, added to a channel's own diagonal: a channel that was always zero has none
MASSIVE = 50.0  # ratio of the largest diagonal to the median from which the channels' own diagonals are taken
FIRST_DAMP = 0.01  # first damping tried when the requested one was 0 and did not suffice


@dataclass(frozen=True)
class Factor:
    """H damped and factored: ``inverse(H) = U^T U`` with U upper triangular.

    Attributes:
        upper: U, [K, K], in solve order.
        order: the weight column quantized at each step of the solve, [K]; None for the natural order.
        damping: the values added to the diagonal, in units of H, in the natural order, [K].
        rule: what ``damping`` is a share of. damp_percent: that share; above the requested value if raised.
        raised: whether the damping had to be raised.
        dead_columns: number of input channels that were always zero; they are rounded to nearest.
    """

    upper: torch.Tensor
    order: torch.Tensor | None
    damping: torch.Tensor
    rule: Damping
    damp_percent: float
    raised: bool
    dead_columns: int


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    """Act-order: columns by descending diagonal of H, [K]."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def group_aware_order(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Act-order that keeps the groups of the natural layout together, [K]: groups by their largest diagonal,
    columns by diagonal inside their group. ``g_idx`` stays trivial on disk, so that every kernel loads it."""
    groups = hessian.diagonal().view(-1, group_size)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    outside = torch.argsort(groups.amax(dim=1), descending=True, stable=True)
    columns = inside + torch.arange(len(groups), device=hessian.device)[:, None] * group_size
    return columns[outside].reshape(-1)


def damping_rule(diagonal: torch.Tensor, damping: Damping = "auto") -> tuple[Damping, torch.Tensor]:
    """The rule that ``damping`` comes to for a Hessian with this ``diagonal`` [K], and what damping is a share of, [K].

    Where a few channels are massive, their mean drowns the curvature of the ordinary ones and hardly damps their own;
    there, each channel is damped by its own diagonal. Where channels are alike, the mean regularizes weak channels
    better, above all at 2 bits (docs/solver.md).
    """
    average = mean(diagonal) or 1.0
    if damping == "auto":
        alive = diagonal[diagonal > 0].double()
        massive = len(alive) > 0 and float(alive.max()) > MASSIVE * float(alive.median())
        damping = "own" if massive else "mean"
    base = diagonal + FLOOR * average if damping == "own" else torch.full_like(diagonal, average)
    return damping, base


def factorize(
    hessian: torch.Tensor, damp_percent: float, order: torch.Tensor | None = None, damping: Damping = "auto"
) -> Factor:
    """Damp, order and factor ``hessian`` [K, K].

    With P the reversal of the order, P H P = L L^T gives H = R R^T for the upper triangular R = P L P, and
    U = inverse(R): one Cholesky factorization and one triangular inverse, where the usual way takes two
    factorizations and an inverse.

    Args:
        order: the columns in solve order, [K]; None for the natural order.

    Raises:
        SolveError: the Hessian is not positive definite at any damping tried.
    """
    diagonal = hessian.diagonal()
    rule, base = damping_rule(diagonal, damping)
    requested = damp_percent
    while damp_percent <= max(DAMP_LIMIT, requested):
        added = base * damp_percent
        damped = _reversed(hessian, order)
        damped.diagonal().add_((added if order is None else added[order]).flip(0))
        inverse = _inverse_of_factor(damped)
        del damped
        if inverse is not None:
            upper = inverse.flip(0, 1)
            del inverse
            if bool(torch.isfinite(upper.diagonal()).all()):
                raised, dead = damp_percent != requested, int((diagonal <= 0).sum())
                return Factor(upper, order, added, rule, damp_percent, raised, dead)
        damp_percent = damp_percent * RAISE_BY or FIRST_DAMP
    raise SolveError(f"its Hessian is not positive definite even with damp_percent {damp_percent / RAISE_BY:g}")


def _inverse_of_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """inverse(L) where ``matrix`` = L L^T, None if it is not positive definite; overwrites ``matrix``."""
    if matrix.device.type == "cpu":
        return matrix if invert_factor(matrix) else None
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    inverse = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse


def _reversed(hessian: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """A copy of H with rows and columns in reversed ``order``; at most two matrices of its size exist at a time."""
    if order is None:
        return hessian.flip(0, 1)
    backwards = order.flip(0)
    return hessian[backwards][:, backwards]
