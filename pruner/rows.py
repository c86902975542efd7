"""Big matrices taken some rows at a time, so that their working copies stay small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.formats import Dense, PackedLinear
from .recipe import Pattern

MOST_WEIGHTS = 2**26  # that working copies are made of at a time


def row_ranges(rows: int, columns: int) -> Iterator[slice]:
    """All rows in order, each range of no more than MOST_WEIGHTS weights; one row at least."""
    step = max(1, MOST_WEIGHTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class StoredLinear(nn.Linear):
    """A linear that computes in its input's dtype, whatever its weight is stored in.

    The bits are the same whatever that is, so that a weight that was read again gives no others.
    Widened copies of the weight live for as long as their rows take.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        ranges = list(row_ranges(self.out_features, self.in_features))
        if len(ranges) == 1:  # as it is: a slice's gradient would be one more copy
            y = functional.linear(x, self.weight.to(x.dtype))
        else:
            parts = [functional.linear(x, self.weight[rows].to(x.dtype)) for rows in ranges]
            y = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


def unpacked(packed: PackedLinear) -> Tensor:
    """The weight [N, K] that is computed with: floats as they are stored, codes widened to fp32."""
    kept = packed.weight if isinstance(packed, Dense) else packed.values
    dtype = kept.dtype if kept.is_floating_point() else torch.float32
    weight = torch.empty(packed.shape, dtype=dtype, device=kept.device)
    for rows in row_ranges(*packed.shape):
        index = torch.arange(rows.start, rows.stop, device=kept.device)
        weight[rows] = packed.rows(index).unpack(dtype)
    return weight


def rows_are_alone(method: str, pattern: Pattern) -> bool:
    """Whether a row's answer does not depend on the rows beside it.

    A share of a whole matrix is one threshold for all rows, and ADMM one step size.
    """
    if method == "admm":
        return pattern.is_dense
    return bool(pattern.of) or pattern.is_dense or method == "wanda"
