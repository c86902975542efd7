"""Linears of one input as one, row after row: fewer and larger products for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4

# Roles of a block, in the order in which they are computed; those of a row have the same input.
TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def alike(weights: Sequence[PackedLinear]) -> bool:
    """Whether they are stored in one format, so that they can be one."""
    return len({(type(each), getattr(each, "group", None)) for each in weights}) == 1


def stacked(weights: Sequence[PackedLinear]) -> PackedLinear:
    """Weights that are `alike` as one [sum of N, K]."""
    first = weights[0]
    tensors = {
        suffix: torch.cat([each.tensors()[suffix] for each in weights])
        for suffix in first.tensors()
    }
    if isinstance(first, Dense):
        return Dense(tensors["weight"])
    assert isinstance(first, Sparse24 | Sparse24Int4 | Int4 | Int8)
    return replace(first, **tensors)  # type: ignore[arg-type]
