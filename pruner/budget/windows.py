"""Four sets of windows that share no token: to fit, to compare formats, to search, to judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError
from ..recipe import Recipe
from ..recover.windows import Windows

SENSED_TOKENS = 2048  # for the sensitivities; they vary by orders of magnitude between linears
_JUDGED_TOKENS = 16384  # the ratio's standard error is then about half a hundredth
_JUDGED_SHARE = 8  # at most one window in so many judges, however short the windows are
_CHECKED_SHARE = 8  # one window for so many that are fitted


@dataclass(frozen=True)
class BudgetWindows:
    """Token windows, int64 [n, length] each.

    `fit` makes the candidates, and should make the final model too; `check` gives their held-out
    errors; `search` measures the whole models among which one is chosen, `judge` the one that was:
    chosen by what it measures on `search`, it is flattered there.
    """

    fit: Tensor
    check: Tensor
    search: Tensor
    judge: Tensor


def checked_windows(recipe: Recipe) -> int:
    """How many windows compare formats."""
    return max(1, recipe.calib_windows // _CHECKED_SHARE)


def judged_windows(recipe: Recipe) -> int:
    """How many windows judge, and how many search, of a text that is long enough."""
    return math.ceil(_JUDGED_TOKENS / recipe.calib_length)


def cut_windows(token_ids: Sequence[int], recipe: Recipe) -> BudgetWindows:
    """Cut a text; as many windows to fit as the recipe asks for.

    Those to search and to judge are spread evenly over the text, in turns; the others are drawn by
    the recipe's seed.

    Raises:
        UsageError: the text is too short for all four.
    """
    length, fitted = recipe.calib_length, recipe.calib_windows
    count = len(token_ids) // length
    judged = max(1, min(judged_windows(recipe), count // _JUDGED_SHARE))
    checked = checked_windows(recipe)
    needed = fitted + checked + 2 * judged
    if count < needed:
        raise UsageError(
            f"the calibration text has {len(token_ids)} tokens; {fitted} windows of {length} to "
            f"fit, {checked} to compare formats, {judged} to search by and {judged} to judge by "
            f"need {needed * length}",
            "give a longer text (--calib), or fewer windows (--calib-windows)",
        )
    cut = Windows.cut(token_ids, length, 2 * judged)
    order = torch.randperm(len(cut.train), generator=torch.Generator().manual_seed(recipe.seed))
    check, fit = order[:checked], order[checked : checked + fitted]
    return BudgetWindows(cut.train[fit], cut.train[check], cut.held_out[0::2], cut.held_out[1::2])
