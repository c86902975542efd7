"""The sets of masks a pattern allows, and the way to the nearest one."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..masks import keep_above_quantile, keep_n_of_m
from ..recipe import Pattern


def choose_support(score: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the highest scores [N, K] under `pattern`; exactly M of N for N:M, whatever ties."""
    if pattern.is_dense:
        return torch.ones_like(score, dtype=torch.bool)
    if pattern.of:
        return keep_n_of_m(score, pattern.kept, pattern.of)
    return keep_above_quantile(score, pattern.fraction)


def quick_support(score: Tensor, pattern: Pattern) -> Tensor:
    """As `choose_support`, but fast, for the inner loop: ties may keep more of a group.

    Whole columns of groups are put in order together, by minima and maxima, which costs a quarter
    of choosing in every group by itself.
    """
    if not pattern.of:
        return choose_support(score, pattern)
    places = list(score.view(score.shape[0], -1, pattern.of).unbind(-1))
    for low, high in sorting_network(pattern.of):
        one, other = places[low], places[high]
        places[low], places[high] = torch.minimum(one, other), torch.maximum(one, other)
    least_kept = places[pattern.of - pattern.kept]
    return score >= least_kept.repeat_interleave(pattern.of, dim=1)


@cache
def sorting_network(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places that, compared in turn, put any `count` values in ascending order.

    Batcher's odd-even merging (1968) in the form that takes any count: Knuth, volume 3, 5.2.2M.
    """
    pairs = []
    highest = 1 << (count - 1).bit_length() >> 1
    block = highest
    while block:
        apart, phase, reach = block, 0, highest
        while True:
            pairs += [(i, i + apart) for i in range(count - apart) if i & block == phase]
            if reach == block:
                break
            apart, phase, reach = reach - block, block, reach // 2
        block //= 2
    return tuple(pairs)
