"""Coordinate descent on 4-bit codes, and moves of a whole group of four with its mask.

Both take the scales as given and lower the objective at every step, so they never lose what the
rounding sweep has won. Everything is [K, N] inside: a column is one contiguous stretch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from ...kernels.groups import expand_groups
from ..int4 import HIGHEST, LOWEST, encode
from .objective import Objective

_BLOCK = 128
_PAIRS = torch.tensor(list(combinations(range(4), 2))).T  # [2, pairs]


def descend(
    objective: Objective, codes: Tensor, keep: Tensor, scale: Tensor, group: int, sweeps: int = 4
) -> Tensor:
    """Better codes [N, K] on the same mask and scales: each in turn set to its best value.

    For code j the others are fixed, so its best value is the nearest to w_j - gradient_j / H_jj.
    """
    columns = codes.shape[1]
    wide = expand_groups(scale.float(), group, columns).T.contiguous()
    kept = keep.T.contiguous()
    codes = codes.T.contiguous()
    diagonal = objective.hessian.diagonal()

    def step(j: int, gradient: Tensor) -> Tensor:
        best = codes[j] - gradient / (diagonal[j] * wide[j])
        best = torch.where(kept[j], best.round_().clamp_(LOWEST, HIGHEST), 0)
        moved = (best - codes[j]) * wide[j]
        codes[j] = best
        return moved

    _sweep(objective, lambda: codes * wide, step, 1, sweeps)
    return codes.T.contiguous()


def move_groups(
    objective: Objective, codes: Tensor, keep: Tensor, scale: Tensor, group: int, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """Better codes and a better 2:4 mask, both [N, K]: each aligned four in turn, all else fixed.

    Tries all six pairs of kept columns. The best real values of a pair solve a 2x2 system; tried
    are both roundings of either, the other one then being set to its best code.
    """
    columns = codes.shape[1]
    wide = expand_groups(scale.float(), group, columns).T.contiguous()
    kept = keep.T.contiguous()
    codes = codes.T.contiguous()

    def step(start: int, gradient: Tensor) -> Tensor:
        four = slice(start, start + 4)
        local = objective.hessian[four, four]
        s = wide[start]  # one scale: groups are multiples of four
        old = codes[four]
        new, mask = _best_four(local, gradient - local @ (old * s), old, kept[four], s)
        moved = (new - old) * s
        codes[four], kept[four] = new, mask
        return moved

    _sweep(objective, lambda: codes * wide, step, 4, sweeps)
    return codes.T.contiguous(), kept.T.contiguous()


def _best_four(
    local: Tensor, slope: Tensor, old: Tensor, kept: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes [4, N] and mask [4, N] that minimise 1/2 x H x + slope x over legal fours x = codes s.

    `local` H [4, 4], `slope` [4, N]; `old` and `kept` stay where nothing is better. All pairs and
    all roundings are tried at once, as [tries, pairs, N].
    """
    a, b = _PAIRS.to(local.device)
    haa, hbb, hab = (local[i, j][:, None] for i, j in ((a, a), (b, b), (a, b)))
    u, v = -slope[a] / s, -slope[b] / s  # [pairs, N], in units of the scale
    determinant = haa * hbb - hab * hab
    x = (hbb * u - hab * v) / determinant
    y = (haa * v - hab * u) / determinant
    first = torch.stack([x.floor(), x.ceil()]).clamp_(LOWEST, HIGHEST)
    second = torch.stack([y.floor(), y.ceil()]).clamp_(LOWEST, HIGHEST)
    p = torch.cat([first, encode(u - hab * second, haa)])
    q = torch.cat([encode(v - hab * first, hbb), second])
    cost = p * (0.5 * haa * p + hab * q - u) + q * (0.5 * hbb * q - v)
    least, best = (cost * (s * s)).flatten(0, 1).min(dim=0)
    pair = best % len(a)
    codes, mask = torch.zeros_like(old), torch.zeros_like(kept)
    for slot, value in ((a[pair], p), (b[pair], q)):
        codes.scatter_(0, slot[None], value.flatten(0, 1).gather(0, best[None]))
        mask.scatter_(0, slot[None], True)
    better = least < _cost(local, slope, old * s)
    return torch.where(better, codes, old), torch.where(better, mask, kept)


def _cost(local: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    return (x * (0.5 * (local @ x) + slope)).sum(dim=0)


def _sweep(
    objective: Objective,
    current: Callable[[], Tensor],
    step: Callable[[int, Tensor], Tensor],
    width: int,
    sweeps: int,
) -> None:
    """Visit all columns, `width` at a time, with the gradient [width or N, N] always up to date.

    `step(j, gradient)` changes its columns and returns by how much. Within a block of columns the
    gradient follows at once, in the other blocks after the block is done.
    """
    hessian = objective.hessian
    gradient = hessian @ current() - objective.linear.T
    columns = len(hessian)
    for _ in range(sweeps):
        still = True
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            block = gradient[start:stop].clone()
            moved = torch.zeros_like(block)
            for j in range(start, stop, width):
                i = j - start
                here = slice(i, i + width)
                change = step(j, block[i] if width == 1 else block[here])
                moved[here] = change
                rest = block[i + width :]
                if width == 1:
                    rest.addr_(hessian[i + start + 1 : stop, j], change)
                else:
                    rest.addmm_(hessian[j + width : stop, j : j + width], change)
            gradient.addmm_(hessian[:, start:stop], moved)
            still = still and not bool(moved.any())
        if still:
            return
