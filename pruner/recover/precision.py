"""In which precision a recovery multiplies matrices: fp32, or bf16 where that is faster.

Weights, moments, norms and losses are fp32 in either case. Which one is faster is a property of the
machine: bf16 products take half the time of fp32 ones on a Zen 4, and twice the time on a Xeon in a
virtual machine that hides its tile unit. So it is measured, not looked up.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

PRECISIONS = ("auto", "float32", "bfloat16")
# Casting the weights anew in each step costs some of what is gained, and a figure near 1 would let
# noise decide.
_WORTH = 1.3
_SIDES = (512, 768, 1024)  # rows and both widths of the product that is timed
_ROUNDS = 8
_BELOW_BF16 = 2**16  # a bf16 value is the upper 16 bits of an fp32 one


def resolved(precision: str, device: torch.device) -> str:
    """`float32` or `bfloat16`: what was asked for, or the faster one on this machine.

    Args:
        precision: one of PRECISIONS.
        device: where the model is trained; a GPU's tensor cores are not timed but taken.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(False) else "float32"
    return "bfloat16" if _speedup() > _WORTH else "float32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model's matrix products are of that (resolved) precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class Dither:
    """Rounds the weights of one linear to bf16 values by thresholds of their own, fixed for good.

    A checkpoint's weights are bf16 values already, and a step moves a weight by less than the
    distance to the next. Rounded to nearest, all would stand still for many steps and then move at
    once; with a threshold for each, drawn evenly, a small move changes the share of the weights
    that is as large as the move. (Stochastic rounding, Gupta et al., 1502.02551, with numbers drawn
    once: the sums of a row's and a column's.)
    """

    def __init__(self, weight: Tensor, seed: int) -> None:
        """`weight` fp32 [N, K] tells shape and device."""
        generator, device = torch.Generator().manual_seed(seed), weight.device
        self._rows, self._columns = (
            torch.randint(
                _BELOW_BF16, size, generator=generator, dtype=torch.int32, device="cpu"
            ).to(device)
            for size in ((weight.shape[0], 1), (1, weight.shape[1]))
        )

    def round_(self, weight: Tensor) -> None:
        """Change finite fp32 weights [N, K] in place; bf16 values, and so zeros, stay."""
        thresholds = (self._rows + self._columns).bitwise_and_(_BELOW_BF16 - 1)
        weight.view(torch.int32).add_(thresholds).bitwise_and_(-_BELOW_BF16)


def _speedup() -> float:
    """Time of an fp32 product over that of a bf16 one, each the fastest of several, in turns."""
    rows, inner, columns = _SIDES
    pairs = {
        dtype: (torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    fastest = dict.fromkeys(pairs, float("inf"))
    for _ in range(_ROUNDS):
        for dtype, (left, right) in pairs.items():
            started = time.perf_counter()
            left @ right
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - started)
    return fastest[torch.float32] / fastest[torch.bfloat16]
