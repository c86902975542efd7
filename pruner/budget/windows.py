"""Three sets of token windows that share no token: to fit, to compare formats, to judge models."""

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
_JUDGED_SHARE = 4  # at most one window in so many judges, however short the windows are
_CHECKED_SHARE = 8  # one window for so many that are fitted


@dataclass(frozen=True)
class BudgetWindows:
    """Token windows, int64 [n, length] each.

    `fit` makes the candidates, and should make the final model too; `check` gives their held-out
    errors; `judge` is only ever used to measure whole models.
    """

    fit: Tensor
    check: Tensor
    judge: Tensor


def checked_windows(recipe: Recipe) -> int:
    """How many windows compare formats."""
    return max(1, recipe.calib_windows // _CHECKED_SHARE)


def judged_windows(recipe: Recipe) -> int:
    """How many windows judge models, of a text that is long enough."""
    return math.ceil(_JUDGED_TOKENS / recipe.calib_length)


def cut_windows(token_ids: Sequence[int], recipe: Recipe) -> BudgetWindows:
    """Cut a text; as many windows to fit as the recipe asks for.

    The judging ones are spread evenly over the text, the others drawn by the recipe's seed.

    Raises:
        UsageError: the text is too short for all three.
    """
    length, fitted = recipe.calib_length, recipe.calib_windows
    count = len(token_ids) // length
    judged = max(1, min(judged_windows(recipe), count // _JUDGED_SHARE))
    checked = checked_windows(recipe)
    if count < judged + checked + fitted:
        raise UsageError(
            f"the calibration text has {len(token_ids)} tokens; {fitted} windows of {length} to "
            f"fit, {checked} to compare formats and {judged} to judge models need "
            f"{(fitted + checked + judged) * length}",
            "give a longer text (--calib), or fewer windows (--calib-windows)",
        )
    cut = Windows.cut(token_ids, length, judged)
    order = torch.randperm(len(cut.train), generator=torch.Generator().manual_seed(recipe.seed))
    check, fit = order[:checked], order[checked : checked + fitted]
    return BudgetWindows(cut.train[fit], cut.train[check], cut.held_out)
