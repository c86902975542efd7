"""The factor of an inverse Hessian that SparseGPT sweeps with, by LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import LADDER


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, and the damping used.

    U[j, j]^2 is then the first diagonal element of the inverse of H[j:, j:]: what is left when the
    columns before j are fixed. Inputs that are always zero get a one on the diagonal. Damping rises
    tenfold, up to three times, when H is not positive definite; then U is None.
    """
    dead = hessian.diagonal() == 0
    alive = hessian + torch.diag(dead.to(hessian.dtype))
    mean = alive.diagonal().mean()
    for step in range(LADDER):
        raised = damping * 10**step
        damped = alive + torch.eye(len(alive), device=alive.device) * (raised * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(factor).all()):
                return factor, raised
    return None, damping
