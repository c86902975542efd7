"""Rounding kept weights one column at a time, each error pushed onto the columns still to come.

GPTQ (Frantar et al., 2210.17323) with a mask that does not move and with columns in order of their
inputs' energy. The drift that the updates cause at pruned columns is itself an error to push on:
masking the updates instead was measured to be worse than not updating at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.groups import expand_groups
from ..int4 import encode
from .objective import Objective, inverse_factor

_BLOCK = 128  # columns per lazy update
_UNIT = 4  # columns that stay together in the order


def round_in_order(
    objective: Objective, weight: Tensor, keep: Tensor, scale: Tensor, group: int
) -> Tensor:
    """Codes fp32 [N, K], zero where not kept, of `weight` [N, K] on the grid of `scale`."""
    columns = weight.shape[1]
    order = _by_energy(objective.hessian.diagonal())
    factor = inverse_factor(objective.hessian[order][:, order])
    # Columns become rows: each step then works on one contiguous stretch of memory.
    left = weight[:, order].T.contiguous()
    kept = keep[:, order].T.contiguous()
    wide = expand_groups(scale.float(), group, columns)[:, order].T.contiguous()
    codes = torch.zeros_like(left)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, inner = left[start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            j = start + i
            codes[j] = torch.where(kept[j], encode(block[i], wide[j]), 0)
            errors[i] = (block[i] - codes[j] * wide[j]) / inner[i, i]
            block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _by_energy(diagonal: Tensor) -> Tensor:
    """Column order [K]: aligned fours by descending energy, so that late ones have little to lose.

    A last group of fewer columns keeps its place at the end.
    """
    whole = len(diagonal) // _UNIT * _UNIT
    energy = diagonal[:whole].view(-1, _UNIT).sum(dim=1)
    fours = torch.argsort(energy, descending=True, stable=True)
    front = (fours[:, None] * _UNIT + torch.arange(_UNIT, device=fours.device)).flatten()
    return torch.cat([front, torch.arange(whole, len(diagonal), device=fours.device)])
