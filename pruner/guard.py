"""Never worse than SparseGPT: both are tried, and windows that neither has seen decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .methods import METHODS
from .methods.base import InputStatistics, Lost, Pruned, Target, mixed_lost
from .recipe import Recipe
from .solvers.objective import IndefiniteError

BASELINE = "sparsegpt"
_GUARDED = "admm"
_SHARE = 16  # one window in so many is held out


@dataclass(frozen=True)
class Solved:
    """What is kept of a linear's solutions, which method made it, and both held-out errors."""

    pruned: Pruned
    method: str
    held_out: Lost | None = None
    baseline: Lost | None = None

    @property
    def held_out_error(self) -> float | None:
        """Of what is kept."""
        return None if self.held_out is None else Lost.relative([self.held_out])

    @property
    def baseline_error(self) -> float | None:
        """SparseGPT's."""
        return None if self.baseline is None else Lost.relative([self.baseline])


def together(parts: Sequence[Solved]) -> Solved:
    """What to say of rows that were solved in parts; the weights are those of the last."""
    notes = dict.fromkeys(note for part in parts for note in part.pruned.note.split("; ") if note)
    return Solved(
        replace(parts[-1].pruned, note="; ".join(notes)),
        " and ".join(sorted({name for part in parts for name in part.method.split(" and ")})),
        _sum([part.held_out for part in parts]),
        _sum([part.baseline for part in parts]),
    )


def _sum(parts: Sequence[Lost | None]) -> Lost | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return Lost(sum(part.lost for part in known), sum(part.whole for part in known))


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
    is a baseline, nor a linear so wide that SparseGPT would use up its Hessian. Where ours finds
    no way, SparseGPT's is taken, which always has one, but for such a wide linear.

    Raises:
        IndefiniteError: it is wide, and its Hessian of no use.
    """
    try:
        ours = METHODS[method](weight, fit, target)
    except IndefiniteError as error:
        if fit.wide:  # others share the Hessian that SparseGPT would use up
            raise
        theirs = METHODS[BASELINE](weight, fit, target)
        note = "; ".join(filter(None, (error.message, theirs.note)))
        return Solved(replace(theirs, note=note), BASELINE)
    if check is None or method != _GUARDED or fit.wide:
        return Solved(ours, method)
    theirs = METHODS[BASELINE](weight, fit, target)
    lost = mixed_lost(weight, ours.weight, check, target.mix)
    baseline = mixed_lost(weight, theirs.weight, check, target.mix)
    if lost.lost <= baseline.lost:
        return Solved(ours, method, lost, baseline)
    return Solved(theirs, BASELINE, baseline, baseline)
