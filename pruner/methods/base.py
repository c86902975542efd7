"""The one signature of a pruning method, and the types that pass through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.groups import expand_groups
from ..int4 import round_to_nearest
from ..recipe import Pattern


@dataclass(frozen=True)
class InputStatistics:
    """What calibration learned of one linear's inputs X [tokens, K].

    `hessian` is X^T X / tokens in fp32: the layer error's Hessian up to a factor, which no method
    here depends on (damping is relative to its diagonal).
    """

    hessian: Tensor  # [K, K]
    tokens: int


@dataclass(frozen=True)
class Target:
    """What a method has to produce: the pattern, and 16 bits or 4 with a group size."""

    pattern: Pattern
    bits: int
    group: int
    damping: float


@dataclass(frozen=True)
class Pruned:
    """A method's result. `weight` already lies on the 4-bit grid when there are codes."""

    weight: Tensor  # fp32 [N, K], zero where not kept
    keep: Tensor  # bool [N, K]
    codes: Tensor | None = None  # fp32 integers [N, K]
    scale: Tensor | None = None  # fp16 [N, groups]
    note: str = ""


Method = Callable[[Tensor, InputStatistics, Target], Pruned]


def from_mask(weight: Tensor, keep: Tensor, target: Target) -> Pruned:
    """Finish a method that only chooses a mask: drop the rest, round to nearest if 4-bit."""
    if target.bits == 16:
        return Pruned(torch.where(keep, weight, 0), keep)
    codes, scale = round_to_nearest(weight, keep, target.group)
    columns = weight.shape[1]
    return Pruned(codes * expand_groups(scale.float(), target.group, columns), keep, codes, scale)


def relative_error(original: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 on the calibration tokens; 0 when the layer saw no signal."""
    difference = original - pruned
    lost = ((difference @ hessian) * difference).sum()
    whole = ((original @ hessian) * original).sum()
    return float(lost / whole) if float(whole) > 0 else 0.0
