"""Choosing which weights stay, given a score for each. Knows scores, not where they come from."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_n_of_m(score: Tensor, kept: int, of: int) -> Tensor:
    """Keep the `kept` highest scores of every aligned `of` columns: bool [N, K].

    K must be a multiple of `of`. Exactly `kept` per group stay, whatever the ties.
    """
    rows, columns = score.shape
    groups = score.view(rows, columns // of, of)
    winners = groups.topk(kept, dim=-1).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, winners, True)
    return keep.view(rows, columns)


def keep_above_quantile(score: Tensor, fraction: float) -> Tensor:
    """Drop the lowest `fraction` of all scores of the matrix: bool [N, K].

    As in SparseGPT and in Wanda's magnitude baseline: the threshold is the score at index
    int(numel * fraction) of the sorted scores, and scores equal to it are dropped too.
    """
    index = min(int(score.numel() * fraction), score.numel() - 1)
    return score > score.flatten().kthvalue(index + 1).values  # an eighth of the time of a sort


def keep_per_row(score: Tensor, fraction: float) -> Tensor:
    """Drop the lowest int(K * fraction) scores of each row: bool [N, K] (Wanda's comparison)."""
    dropped = score.sort(dim=-1, stable=True).indices[:, : int(score.shape[1] * fraction)]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, dropped, False)


def is_n_of_m(weight: Tensor, kept: int, of: int) -> bool:
    """Whether every aligned group of `of` columns has at most `kept` non-zeros."""
    rows, columns = weight.shape
    if columns % of:
        return False
    counts = (weight != 0).view(rows, columns // of, of).sum(dim=-1)
    return bool((counts <= kept).all())
