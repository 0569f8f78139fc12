"""The target weight of asymmetric calibration: on the quantized model's inputs, it gives the source model's outputs.

Source: the asymmetric calibration of Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration", 2025, https://arxiv.org/abs/2504.02692. With S [T, K] the source's inputs and X [T, K] the quantized
model's, min |W S^T - W* X^T| has the closed solution W* = W + W D inverse(H), D = (S - X)^T X, H = X^T X. The full
step overfits the calibration text; a fraction of it measured better (docs/solver.md).
"""

from __future__ import annotations

import torch

from quantize.methods.factor import Damping, factorize

SHARE = 0.25
DAMP_PERCENT = 0.1


def toward_source(
    weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, damping: Damping = "auto"
) -> torch.Tensor:
    """Return the weight [N, K] to quantize in place of ``weight`` [N, K].

    Args:
        hessian: H [K, K]. drift: D [K, K]. damping: the rule by which H is damped.

    Raises:
        SolveError: H is not positive definite at any damping tried.
    """
    upper = factorize(hessian, DAMP_PERCENT, damping=damping).upper
    return weight + SHARE * ((weight @ drift) @ upper.t()) @ upper
