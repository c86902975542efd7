"""The plain torch oracle of every operation: slow, obvious, what kernels are tested against."""

from __future__ import annotations

from torch import Tensor

from .formats import PackedLinear


def linear(x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b in fp32. x is [..., K]; returns fp32 [..., N]."""
    y = x.float() @ weight.unpack().T
    return y if bias is None else y + bias.float()
