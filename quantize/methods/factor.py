"""The factor of the inverse Hessian that GPTQ walks along, with damping raised where it has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantize.errors import SolveError
from quantize.methods.sums import mean
from quantize.methods.triangular import invert_factor

RAISE_BY = 10.0
DAMP_LIMIT = 10.0
FIRST_DAMP = 0.01  # where none was wished


@dataclass(frozen=True)
class Factor:
    """H damped and factored: ``inverse(H) = U^T U`` with U upper triangular.

    Attributes:
        upper: U, [K, K], in solve order.
        order: column of the weight that each step of the solve takes, [K]; None for the natural order.
        damping: what was added to the diagonal, in units of H.
        damp_percent: ``damping`` as a share of the diagonal's mean; above the wish where it was raised.
        raised: whether it had to be raised.
        dead_columns: input channels that were always zero; they are rounded to nearest.
    """

    upper: torch.Tensor
    order: torch.Tensor | None
    damping: float
    damp_percent: float
    raised: bool
    dead_columns: int


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    """Columns by falling diagonal of H, [K]: act-order."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def group_aware_order(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Act-order that keeps the groups of the natural layout together, [K]: groups by their largest diagonal,
    columns by diagonal inside their group. ``g_idx`` stays trivial on disk, so that every kernel loads it."""
    groups = hessian.diagonal().view(-1, group_size)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    outside = torch.argsort(groups.amax(dim=1), descending=True, stable=True)
    columns = inside + torch.arange(len(groups), device=hessian.device)[:, None] * group_size
    return columns[outside].reshape(-1)


def factorize(hessian: torch.Tensor, damp_percent: float, order: torch.Tensor | None = None) -> Factor:
    """Damp, order and factor ``hessian`` [K, K].

    With P the reversal of the order, P H P = L L^T gives H = R R^T for the upper triangular R = P L P, and
    U = inverse(R): one Cholesky factorization and one triangular inverse, where the usual way takes two
    factorizations and an inverse.

    Args:
        order: the columns in the order in which the solve takes them, [K]; None for the natural one.

    Raises:
        SolveError: not positive definite however much it is damped.
    """
    diagonal = hessian.diagonal()
    average = mean(diagonal) or 1.0
    wished = damp_percent
    while damp_percent <= max(DAMP_LIMIT, wished):
        damped = _reversed(hessian, order)
        damped.diagonal().add_(damp_percent * average)  # the only entry of a dead channel: it stands alone
        inverse = _inverse_of_factor(damped)
        del damped
        if inverse is not None:
            upper = inverse.flip(0, 1)
            del inverse
            if bool(torch.isfinite(upper.diagonal()).all()):
                raised = damp_percent != wished
                return Factor(upper, order, damp_percent * average, damp_percent, raised, int((diagonal <= 0).sum()))
        damp_percent = damp_percent * RAISE_BY or FIRST_DAMP
    raise SolveError(f"its Hessian is not positive definite even with damp_percent {damp_percent / RAISE_BY:g}")


def _inverse_of_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """inverse(L) where ``matrix`` = L L^T, which is spoilt; None where it is not positive definite."""
    if matrix.device.type == "cpu":
        return matrix if invert_factor(matrix) else None
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    inverse = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse


def _reversed(hessian: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """H with rows and columns in ``order`` backwards, a copy; no more than two of its size live at a time."""
    if order is None:
        return hessian.flip(0, 1)
    backwards = order.flip(0)
    return hessian[backwards][:, backwards]
