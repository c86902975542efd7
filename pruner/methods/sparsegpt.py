"""SparseGPT (Frantar & Alistarh, 2301.00774), alone and jointly with 4-bit rounding.

One sweep over the columns: each column's loss is pushed onto the columns to its right, weighted by
the inverse Hessian. With the pattern "dense" and 4 bits this is GPTQ (2210.17323). Follows the
published algorithm: block of 128 columns, damping relative to the mean diagonal, the mask of an
N:M group chosen from the already compensated weights, and, for an unstructured share, one mask per
block of columns. The 4-bit grid differs from the published code on purpose: symmetric and grouped,
as the format stores it, with a group's scale taken when the sweep reaches the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..int4 import absmax_scale, encode
from ..masks import keep_above_quantile, keep_n_of_m
from . import magnitude
from .base import InputStatistics, Pruned, Target

BLOCK = 128  # columns per lazy update; every group size and every M divides it


def prune(weight: Tensor, statistics: InputStatistics, target: Target) -> Pruned:
    """Prune fp32 [N, K] with error compensation.

    Falls back to magnitude, and says so in the result's note, when no damping of the ladder makes
    the Hessian positive definite.
    """
    factor = statistics.factor(target.damping)
    if factor.upper is None:
        fallback = magnitude.prune(weight, statistics, target)
        note = "singular Hessian: fell back to magnitude"
        return Pruned(fallback.weight, fallback.keep, fallback.codes, fallback.scale, note)
    weight = torch.where(factor.dead, 0, weight)
    raised = factor.damping != target.damping
    note = f"damping raised to {factor.damping:g}" if raised else ""
    return _sweep(weight, factor.upper, target, note)


def _sweep(weight: Tensor, factor: Tensor, target: Target, note: str) -> Pruned:
    """Prune `weight` [N, K], which is used up, by `factor` [K, K], whose upper triangle counts."""
    columns = weight.shape[1]
    result = torch.zeros_like(weight)
    keep = torch.ones_like(weight, dtype=torch.bool)
    codes = torch.zeros_like(weight if target.bits == 4 else weight[:0])
    scales: list[Tensor] = []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = weight[:, start:stop].clone()
        inner = factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        if target.pattern.fraction and not target.pattern.of:
            saliency = block**2 / inner.diagonal() ** 2
            keep[:, start:stop] = keep_above_quantile(saliency, target.pattern.fraction)
        for i in range(stop - start):
            j = start + i
            _choose_group(keep, block, inner, target, start, i)
            if target.bits == 4 and j % target.group == 0:
                scales.append(absmax_scale(block[:, i : i + target.group]))
            column = block[:, i]
            kept = torch.where(keep[:, j], column, 0)
            if target.bits == 4:
                codes[:, j] = encode(kept, scales[-1])
                kept = codes[:, j] * scales[-1].float()
            result[:, j] = kept
            errors[:, i] = (column - kept) / inner[i, i]
            block[:, i:] -= errors[:, i : i + 1] * inner[i, i:]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    if target.bits == 16:
        return Pruned(result, keep, note=note)
    return Pruned(result, keep, codes, torch.stack(scales, dim=1), note)


def _choose_group(
    keep: Tensor, block: Tensor, inner: Tensor, target: Target, start: int, i: int
) -> None:
    """At the first column of an N:M group, choose its mask from the compensated weights."""
    of = target.pattern.of
    if of and i % of == 0:
        saliency = block[:, i : i + of] ** 2 / inner.diagonal()[i : i + of] ** 2
        chosen = keep_n_of_m(saliency, target.pattern.kept, of)
        keep[:, start + i : start + i + of] = chosen
