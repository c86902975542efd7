"""An order of a linear's inputs in which an N:M pattern costs least.

Every group of M inputs may keep N weights a row, so inputs that matter for the same rows should not
share a group. After RIA's channel permutation (Zhang et al., ICLR 2024, section 4.2): inputs are
dealt by importance, then the members of one slot of every group are matched with groups anew. The
matching here is by exchanges of two, all that do not touch each other at once, until none gains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipe import Pattern
from .objective import Curvature

_MOST_ROWS = 512  # that are looked at: more change the order little
_SWEEPS = 6  # at most
_SETTLED = 50  # ends when less than one group in so many exchanges
_LEAST_GAIN = 1e-6  # of a group's mean worth, and of the two groups' own: less is rounding


def saliency(weight: Tensor, curvature: Curvature) -> Tensor:
    """What removing each weight [N, K] costs, all others adapting: w^2 / [H^-1]_jj (OBS, Hassibi
    and Stork, 1992).
    """
    spectrum = curvature.spectrum
    inverse = (spectrum.vectors.square() / spectrum.values).sum(dim=1) / spectrum.norm.square()
    return weight.square() / inverse


def find_order(worth: Tensor, pattern: Pattern) -> Tensor:
    """Order int64 [K] of the inputs under which groups of an N:M `pattern` keep more of `worth`
    [N, K]; new input i is old input order[i]. Deterministic. K is a multiple of M.
    """
    step = -(-len(worth) // _MOST_ROWS)
    seen = worth[::step]
    ranked = worth.sum(dim=0).argsort(descending=True, stable=True)
    groups = ranked.view(pattern.of, -1).T.contiguous()  # [K / M, M]
    for _ in range(_SWEEPS):
        moved = sum(_match_slot(seen, groups, slot, pattern.kept) for slot in range(pattern.of))
        if moved < len(groups) / _SETTLED:
            break
    return groups.flatten()


def _match_slot(worth: Tensor, groups: Tensor, slot: int, kept: int) -> int:
    """Let the members of one slot change groups, in place; how many did."""
    gains = _kept_worth(worth, groups, slot, kept)
    everyone = torch.arange(len(groups), device=groups.device)
    at, moved = everyone.clone(), 0  # group i gets the member of group at[i]
    while True:
        current = gains[at]
        own = current.diagonal()
        better = current + current.T - own[:, None] - own[None]
        gain, partner = better.max(dim=1)
        # Pairs that are each other's best; the best pair of all is one, so this ends.
        least = _LEAST_GAIN * torch.maximum(own + own[partner], own.mean())
        agreed = (partner[partner] == everyone) & (gain > least)
        agreed &= agreed[partner]  # sums of the same in another order may differ
        if not bool(agreed.any()):
            break
        at = torch.where(agreed, at[partner], at)
        moved += int(agreed.sum())
    groups[:, slot] = groups[at, slot].clone()
    return moved


def _kept_worth(worth: Tensor, groups: Tensor, slot: int, kept: int) -> Tensor:
    """What each group (column) keeps with each group's member (row) in the slot: [K/M, K/M]."""
    others = [other for other in range(groups.shape[1]) if other != slot]
    best = worth[:, groups[:, others]].topk(kept, dim=-1).values  # [N, K/M, kept]
    surely, last = best[..., :-1].sum(dim=-1), best[..., -1].contiguous()
    members = worth[:, groups[:, slot]]
    rows = [
        (torch.maximum(members[:, i : i + 1], last) + surely).sum(dim=0) for i in range(len(groups))
    ]
    return torch.stack(rows)
