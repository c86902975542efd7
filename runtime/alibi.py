"""Attention with linear biases: how fast the scores of a head fall with the distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(heads: int) -> Tensor:
    """What a score loses per position of distance: fp32 [heads] (Press et al., 2108.12409).

    A geometric series for a power of two; other counts take every second one of twice as many for
    the heads that are left, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(heads))
    extra = _series(2 * power)[::2][: heads - power]
    return torch.cat((_series(power), extra))


def _series(heads: int) -> Tensor:
    exponents = torch.arange(1, heads + 1, dtype=torch.float64) * -8 / heads
    return torch.pow(2.0, exponents).float()
