"""Wanda: |w| times the norm of its input (Sun et al., 2306.11695). No weight is changed."""

from __future__ import annotations

from torch import Tensor

from ..masks import keep_per_row
from ..solvers.supports import choose_support
from .base import InputStatistics, Pruned, Target, from_mask


def prune(weight: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Prune fp32 [N, K] by |w_ij| * ||x_j||_2 (eq. 1).

    Scores are compared per group of M for N:M, and within each row otherwise.
    """
    score = weight.abs() * statistics.hessian.diagonal().sqrt()
    pattern = target.pattern
    if pattern.is_dense or pattern.of:
        return from_mask(weight, choose_support(score, pattern), target)
    return from_mask(weight, keep_per_row(score, pattern.fraction), target)
