"""Magnitude pruning: keep the largest weights. The baseline everybody knows; uses no inputs."""

from __future__ import annotations

from torch import Tensor

from ..solvers.supports import choose_support
from .base import InputStatistics, Pruned, Target, from_mask


def prune(weight: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Prune fp32 [N, K] by |w|: per group of M for N:M, over the whole matrix otherwise."""
    return from_mask(weight, choose_support(weight.abs(), target.pattern), target)
