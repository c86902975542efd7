"""Never worse than SparseGPT: both are tried, and windows that neither has seen decide."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .methods import METHODS
from .methods.base import InputStatistics, Pruned, Target, mixed_error
from .recipe import Recipe

BASELINE = "sparsegpt"
_GUARDED = "admm"
_SHARE = 16  # one window in so many is held out


@dataclass(frozen=True)
class Solved:
    """What is kept of a linear's solutions, which method made it, and both held-out errors."""

    pruned: Pruned
    method: str
    held_out_error: float | None = None
    baseline_error: float | None = None


def held_out_windows(recipe: Recipe) -> int:
    """How many calibration windows only judge; baselines that nobody judges prune on all."""
    if recipe.tunes_blocks:
        return max(1, recipe.calib_windows // _SHARE)
    return recipe.calib_windows // _SHARE if recipe.method == _GUARDED else 0


def solve_guarded(
    method: str,
    weight: Tensor,
    fit: InputStatistics,
    check: InputStatistics | None,
    target: Target,
) -> Solved:
    """Prune fp32 `weight` [N, K] on `fit`; on `check` the result is no worse than SparseGPT's.

    Without `check`, too few windows having been given to hold some out, nothing is compared; nor
    is a baseline, nor a linear so wide that SparseGPT would use up its Hessian.
    """
    ours = METHODS[method](weight, fit, target)
    if check is None or method != _GUARDED or fit.wide:
        return Solved(ours, method)
    theirs = METHODS[BASELINE](weight, fit, target)
    error = mixed_error(weight, ours.weight, check, target.mix)
    baseline = mixed_error(weight, theirs.weight, check, target.mix)
    if error <= baseline:
        return Solved(ours, method, error, baseline)
    return Solved(theirs, BASELINE, baseline, baseline)
