"""The best weights on a given mask: masked conjugate gradients, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective

_TOLERANCE = 1e-4  # residual, relative to the first, in the preconditioner's norm


def refit(objective: Objective, start: Tensor, keep: Tensor, iterations: int = 20) -> Tensor:
    """Minimise the objective over weights supported on `keep`, from `start`, both [N, K].

    Jacobi-preconditioned conjugate gradients; every row is a system of its own, and a row that has
    converged no longer moves. Stops at `iterations` or when every residual is small. The result is
    never worse than `start` on the mask.
    """
    weight = torch.where(keep, start, 0)
    inverse = 1 / objective.hessian.diagonal()
    residual = torch.where(keep, -objective.gradient(weight), 0)
    scaled = residual * inverse
    direction = scaled.clone()
    power = (residual * scaled).sum(dim=1)
    first = power.clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(iterations):
        curved = torch.where(keep, direction @ objective.hessian, 0)
        curvature = (direction * curved).sum(dim=1)
        step = torch.where(curvature > 0, power / curvature, 0)
        weight += step[:, None] * direction
        residual -= step[:, None] * curved
        scaled = residual * inverse
        after = (residual * scaled).sum(dim=1)
        if bool((after / first).max() < _TOLERANCE**2):
            break
        direction = scaled + torch.where(power > 0, after / power, 0)[:, None] * direction
        power = after
    return weight
