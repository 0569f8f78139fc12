"""The inverse of a Cholesky factor, in an order of operations that does not depend on the number of threads.

The last bits of LAPACK's factorization depend on the number of threads. Here one recursion computes the factor and its
inverse: halves are joined by matrix products, which :mod:`quantize.methods.products` makes independent of the number
of threads, and blocks of :data:`LEAF` columns are factored by one thread.
"""

from __future__ import annotations

import torch

from quantize.methods.compiled import compiled

LEAF = 64


def invert_factor(matrix: torch.Tensor) -> bool:
    """Replace a symmetric ``matrix`` [K, K] on a CPU by inverse(L), lower triangular, where matrix = L L^T.

    Needs half as much memory again. Returns whether the matrix was positive definite; if not, its content is undefined.
    """
    size = len(matrix)
    if size <= LEAF:
        with compiled() as kernels:
            return bool(kernels.invert_factor(matrix.numpy()))
    # with A = [[A11, .], [A21, A22]]: L21 = A21 inverse(L11)^T, A22 - L21 L21^T = L22 L22^T,
    # and the inverse has -inverse(L22) L21 inverse(L11) in place of A21
    half = (size // LEAF + 1) // 2 * LEAF
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not invert_factor(first):
        return False
    between = below @ first.t()
    last.addmm_(between, between.t(), alpha=-1)
    if not invert_factor(last):
        return False
    torch.mm(last, between @ first, out=below)
    below.neg_()
    matrix[:half, half:].zero_()
    return True
