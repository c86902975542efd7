"""The symmetric 4-bit grid: one fp16 scale per row and group, codes -8..7.

Scales here are the plain ones, max|w| / 7, which never clip; solvers/scales.py looks for better.
Source of the grid: GPTQ (Frantar et al., 2210.17323), symmetric and grouped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.groups import expand_groups, group_count
from ..kernels.nibbles import SMALLEST_SCALE

LOWEST, HIGHEST = -8, 7
_LARGEST_SCALE = 65504.0  # largest finite fp16


def absmax_scale(weight: Tensor) -> Tensor:
    """Scale [N] of one group [N, g]: max|w| / 7, rounded to fp16 before any weight is coded."""
    return to_scale(weight.abs().amax(dim=1) / HIGHEST)


def to_scale(wanted: Tensor) -> Tensor:
    """The nearest scale that can be stored: fp16, within its normal range."""
    return wanted.clamp(SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes, clipped to -8..7. Shapes broadcast; returns fp32 integers."""
    return torch.round(weight / scale.float()).clamp(LOWEST, HIGHEST)


def round_to_nearest(weight: Tensor, keep: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes fp32 [N, K] and scales fp16 [N, groups] of the kept weights, without compensation."""
    kept = torch.where(keep, weight, 0)
    columns = weight.shape[1]
    starts = range(0, group_count(columns, group) * group, group)
    scale = torch.stack([absmax_scale(kept[:, s : s + group]) for s in starts], dim=1)
    return encode(kept, expand_groups(scale, group, columns)), scale
