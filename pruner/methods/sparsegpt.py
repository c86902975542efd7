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
CHUNK = 32  # columns of a block that see each other's errors at once; divides every group size


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
        block = _Block(weight[:, start:stop], factor[start:stop, start:stop], target)
        block.sweep(scales)
        result[:, start:stop] = block.result.T
        keep[:, start:stop] = block.keep.T
        if target.bits == 4:
            codes[:, start:stop] = block.codes.T
        weight[:, stop:].addmm_(block.errors.T, factor[start:stop, stop:], alpha=-1)
    if target.bits == 16:
        return Pruned(result, keep, note=note)
    return Pruned(result, keep, codes, torch.stack(scales, dim=1), note)


class _Block:
    """A block of columns [N, B] on its way through the sweep, transposed: a column is contiguous.

    Within a chunk a column's error is pushed on at once; onto later chunks, a chunk's together.
    """

    def __init__(self, weight: Tensor, factor: Tensor, target: Target) -> None:
        self.weight = weight.T.contiguous()  # [B, N], compensated as the sweep goes on
        self.factor, self.diagonal, self.target = factor, factor.diagonal(), target
        self.keep = torch.ones_like(self.weight, dtype=torch.bool)
        self.result, self.errors = torch.empty_like(self.weight), torch.empty_like(self.weight)
        self.codes = torch.empty_like(self.weight if target.bits == 4 else self.weight[:0])

    def sweep(self, scales: list[Tensor]) -> None:
        """Fill result, keep, errors and codes, all [B, N]; the groups' scales are appended."""
        size = max(CHUNK, self.target.pattern.of)
        for start in range(0, len(self.weight), size):
            stop = min(start + size, len(self.weight))
            for i in range(start, stop):
                self._column(i, stop, scales)
            reach = self.factor[start:stop, stop:].T
            self.weight[stop:].addmm_(reach, self.errors[start:stop], alpha=-1)

    def _column(self, i: int, stop: int, scales: list[Tensor]) -> None:
        """Round column `i`, and push its error onto those up to `stop`."""
        bits, group = self.target.bits, self.target.group
        self._choose_mask(i)
        if bits == 4 and i % group == 0:
            scales.append(absmax_scale(self.weight[i : i + group].T.contiguous()))
        kept = torch.where(self.keep[i], self.weight[i], 0)
        if bits == 4:
            self.codes[i] = encode(kept, scales[-1])
            kept = self.codes[i] * scales[-1].float()
        self.result[i] = kept
        torch.sub(self.weight[i], kept, out=self.errors[i]).div_(self.diagonal[i])
        self.weight[i + 1 : stop].addr_(self.factor[i, i + 1 : stop], self.errors[i], alpha=-1)

    def _choose_mask(self, i: int) -> None:
        """Where columns that share a mask begin, choose it by their compensated weights."""
        pattern = self.target.pattern
        if pattern.of and i % pattern.of == 0:
            saliency = self._saliency(i, i + pattern.of)
            self.keep[i : i + pattern.of] = keep_n_of_m(saliency, pattern.kept, pattern.of).T
        elif pattern.fraction and not pattern.of and i == 0:
            saliency = self._saliency(0, len(self.weight))
            self.keep = keep_above_quantile(saliency, pattern.fraction).T.contiguous()

    def _saliency(self, start: int, stop: int) -> Tensor:
        """What removing each weight of these columns costs, [N, columns]."""
        relative = self.weight[start:stop] / self.diagonal[start:stop, None]
        return relative.square_().T.contiguous()
