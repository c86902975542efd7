"""Scales shared by groups of consecutive input columns, the last group possibly shorter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError


def group_count(columns: int, group: int) -> int:
    """Number of groups that cover `columns`."""
    return -(-columns // group)


def expand_groups(scale: Tensor, group: int, columns: int) -> Tensor:
    """Repeat scales [N, groups] to one per column [N, columns]."""
    return scale.repeat_interleave(group, dim=1)[:, :columns]


def check_scales(name: str, scale: Tensor, rows: int, columns: int, group: int) -> None:
    """Raise CheckpointError unless `scale` is fp16 [rows, groups], finite and above zero."""
    expected = (rows, group_count(columns, group))
    if scale.dtype != torch.float16 or tuple(scale.shape) != expected:
        raise CheckpointError(
            f"{name}.scale: expected torch.float16 {list(expected)}, "
            f"found {scale.dtype} {list(scale.shape)}"
        )
    legal = torch.isfinite(scale) & (scale > 0)
    if not bool(legal.all()):
        row, column = torch.nonzero(~legal)[0].tolist()
        raise CheckpointError(
            f"{name}.scale is {float(scale[row, column])} at [{row}, {column}]; "
            "scales are finite and above zero"
        )
