"""Packed weights written out as dense matrices on a GPU, for one product of many tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expand import expand_fragments, expand_int4
from .fragments import FragmentWeight
from .launch import on_its_device

TRITON_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_PAIRS = 1024  # of a program


def dense_of_fragments(
    weight: FragmentWeight, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The first [rows, columns] of a weight in fragment order; columns are whole fours."""
    dense = weight.values.new_empty(rows, columns, dtype=dtype)
    blocks = weight.blocks[1]
    with torch.cuda.device_of(dense):
        expand_fragments[(triton.cdiv(rows, 64), blocks // 2 if weight.dense else blocks)](
            weight.values,
            weight.meta,
            weight.meta if weight.scales is None else weight.scales,
            dense.view(torch.int64),
            rows,
            columns,
            blocks,
            group=weight.group,
            kind=TRITON_KINDS[dtype],
            both=weight.dense,
        )
    return dense


@on_its_device
def dense_of_int4(values: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of dense codes as they are stored."""
    rows, pairs = values.shape
    dense = values.new_empty(rows, 2 * pairs, dtype=dtype)
    expand_int4[(rows, triton.cdiv(pairs, _PAIRS))](
        values,
        scale,
        dense.view(torch.int32),
        2 * pairs,
        B=_PAIRS,
        group=group,
        kind=TRITON_KINDS[dtype],
    )
    return dense
