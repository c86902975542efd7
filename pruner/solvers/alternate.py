"""Masks by ADMM: the support and the weights on it are found together, not one after the other.

ALPS (Meng et al., 2406.07831) splits "fit the layer" from "obey the pattern" and lets the two
parts agree under a growing penalty rho. Here on the unit-diagonal form of the objective, for any
N:M and for unstructured shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import Pattern
from .objective import Objective
from .supports import choose_support, quick_support

_FIRST_RHO = 0.1
_LEAST_RHO = 1e-3
_CHECK_EVERY = 3  # iterations between two looks at the support
_SETTLED = 3e-4  # share of the support that still changes when it counts as found
_AT_LEAST, _AT_MOST = 30, 300  # iterations


def find_support(objective: Objective, start: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The mask bool [N, K], and weights [N, K] near the best ones on it.

    `start` [N, K] is the unpruned weight. Deterministic.
    """
    spectrum = objective.curvature.spectrum
    norm = spectrum.norm
    fit = start * norm
    pull = (objective.linear / norm) @ spectrum.vectors
    keep = quick_support(fit.abs(), pattern)
    sparse, dual = torch.where(keep, fit, 0), torch.zeros_like(fit)
    rho, raised = _FIRST_RHO, False
    before = keep
    for iteration in range(1, _AT_MOST + 1):
        mixed = pull + (rho * sparse - dual) @ spectrum.vectors
        fit = (mixed / (spectrum.values + rho)) @ spectrum.vectors.T
        wanted = fit + dual / rho
        keep = quick_support(wanted.abs(), pattern)
        sparse = torch.where(keep, wanted, 0)
        dual += rho * (fit - sparse)
        if iteration % _CHECK_EVERY:
            continue
        changed = float((keep != before).sum()) / max(1.0, float(keep.sum()))
        before = keep
        if changed == 0 and not raised and rho > _LEAST_RHO:
            rho /= 5  # the penalty froze the first guess: start again, softer
            sparse, dual = torch.where(keep, start * norm, 0), torch.zeros_like(fit)
            continue
        if changed == 0 or (iteration > _AT_LEAST and changed < _SETTLED):
            break
        rho *= _growth(changed)
        raised = True
    keep = choose_support(wanted.abs(), pattern)
    return keep, torch.where(keep, wanted, 0) / norm


def _growth(changed: float) -> float:
    """The schedule of ALPS: the more of the support still moves, the faster rho grows."""
    if changed > 0.1:
        return 1.3
    return 1.2 if changed > 0.005 else 1.1
