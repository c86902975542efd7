"""Our own method: ADMM masks, weights refitted on them, and 4-bit codes found by descent.

Everything lowers one objective (solvers/objective.py). 16 bits: the mask by ADMM, then the best
weights on it. 4 bits go on from there: scales for the kept weights, a rounding sweep on the fixed
mask, then codes, scales and, for 2:4, masks improved in turn, each step only where it gains.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels.groups import expand_groups
from ..solvers.alternate import find_support
from ..solvers.descent import descend, move_groups
from ..solvers.objective import Objective, make_objective
from ..solvers.refit import refit
from ..solvers.scales import refit_scales, search_scales
from ..solvers.supports import choose_support
from ..solvers.sweep import round_in_order
from .base import InputStatistics, Pruned, Target

_ROUNDS = 2  # of codes, then scales


def prune(weight: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Prune fp32 [N, K].

    Raises:
        HalfweaveError: the Hessian is not positive definite at any damping of the ladder.
    """
    curvature = statistics.curvature(target.damping)
    objective = make_objective(weight, curvature, statistics.drift, target.mix)
    raised = curvature.damping != target.damping
    note = f"damping raised to {curvature.damping:g}" if raised else ""
    if target.pattern.is_dense:
        keep, near = choose_support(weight, target.pattern), weight
    else:
        keep, near = find_support(objective, weight, target.pattern)
    fitted = refit(objective, near, keep)
    if target.bits == 16:
        return Pruned(fitted, keep, note=note)
    return _rounded(objective, fitted, keep, target, note)


def quantize(weight: Tensor, keep: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Round weights [N, K] that are good as they are on their mask `keep` to 4 bits.

    The rounded layer repeats the outputs of `weight`, with the target's mix of those on inputs that
    nothing was rounded before; a 2:4 mask may still move where that helps.
    """
    curvature = statistics.curvature(target.damping)
    objective = make_objective(weight, curvature, statistics.drift, target.mix)
    return _rounded(objective, refit(objective, weight, keep), keep, target, "")


def _rounded(
    objective: Objective, fitted: Tensor, keep: Tensor, target: Target, note: str
) -> Pruned:
    group = target.group
    scale = search_scales(fitted, keep, objective.curvature.diagonal, group)
    codes = round_in_order(objective, fitted, keep, scale, group)
    for _ in range(_ROUNDS):
        codes = descend(objective, codes, keep, scale, group)
        scale = refit_scales(objective, codes, scale, group)
    if target.pattern.is_24:
        codes, keep = move_groups(objective, codes, keep, scale, group)
        scale = refit_scales(objective, codes, scale, group)
        codes = descend(objective, codes, keep, scale, group, sweeps=1)
    grid = expand_groups(scale.float(), group, codes.shape[1])
    return Pruned(codes * grid, keep, codes, scale, note)
