"""Packed weights written out as dense matrices on a GPU, for one product of many tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .expand import expand_fragments, expand_int4

_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_PAIRS = 1024  # of a program


def dense_of_fragments(
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    shape: tuple[int, int],
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The first `shape` = [N, K] of a weight in fragment order (fragments.py), K in fours."""
    rows, columns = shape
    dense = values.new_empty(rows, columns, dtype=dtype)
    blocks = meta.shape[1]
    expand_fragments[(triton.cdiv(rows, 64), blocks)](
        values,
        meta,
        meta if scales is None else scales,
        dense.view(torch.int64),
        rows,
        columns,
        blocks,
        group=group,
        kind=_KINDS[dtype],
    )
    return dense


def dense_of_int4(values: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of dense codes as they are stored."""
    rows, pairs = values.shape
    dense = values.new_empty(rows, 2 * pairs, dtype=dtype)
    expand_int4[(rows, triton.cdiv(pairs, _PAIRS))](
        values, scale, dense.view(torch.int32), 2 * pairs, B=_PAIRS, group=group, kind=_KINDS[dtype]
    )
    return dense
