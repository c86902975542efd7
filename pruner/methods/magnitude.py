"""Magnitude pruning: keep the largest weights. The baseline everybody knows; uses no inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import keep_above_quantile, keep_n_of_m
from .base import InputStatistics, Pruned, Target, from_mask


def prune(weight: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Prune fp32 [N, K] by |w|: per group of M for N:M, over the whole matrix otherwise."""
    return from_mask(weight, choose(weight.abs(), target), target)


def choose(score: Tensor, target: Target) -> Tensor:
    """Mask of the highest scores under the target's pattern: bool [N, K]."""
    pattern = target.pattern
    if pattern.is_dense:
        return torch.ones_like(score, dtype=torch.bool)
    if pattern.of:
        return keep_n_of_m(score, pattern.kept, pattern.of)
    return keep_above_quantile(score, pattern.fraction)
