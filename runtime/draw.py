"""Draws next tokens where the scores are, so that a GPU's vocabulary need not be copied.

The same filters in the same order as sampler.py, which is the tests' oracle, for all rows at once.
A row depends on no other: each brings its own number to draw by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 32  # at a time: bounds the memory of sorted scores and of their sums


@dataclass(frozen=True)
class Draw:
    """How one row's token is chosen; see SamplingParams. `drawn` is in [0, 1).

    With `temperature` 0 it is the likeliest one.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    drawn: float = 0.0


def drawn_tokens(scores: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [rows] from scores fp32 [rows, vocab], and the greatest scores [rows].

    A greatest score that is no number says that some score of the row is none; its token means
    nothing then.
    """
    parts = [
        _drawn(some, draws[start : start + _ROWS])
        for start, some in zip(range(0, len(draws), _ROWS), scores.split(_ROWS), strict=True)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([best for _, best in parts])


def _drawn(scores: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    best, likeliest = scores.max(-1)
    if all(draw.temperature == 0 for draw in draws):
        return likeliest, best
    temperature = _column([draw.temperature or 1.0 for draw in draws], scores)
    chances = ((scores - best[:, None]) / temperature.float()).exp()
    order, nucleus = None, _column([draw.top_p < 1 for draw in draws], scores) > 0
    if any(draw.top_k or draw.top_p < 1 for draw in draws):
        chances, order = _filtered(scores, chances, draws)
    least = _column([draw.min_p for draw in draws], scores).float()
    # The likeliest has a chance of 1 up to here.
    chances = torch.where(chances >= least, chances, 0)
    if order is not None:  # a nucleus is drawn from in the order of its chances
        chances = torch.where(nucleus, chances.gather(1, order), chances)
    sums = chances.cumsum(-1, dtype=torch.float64)
    wanted = _column([draw.drawn for draw in draws], scores) * sums[:, -1:]
    # Rounding may lead behind the last chance that is not zero.
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    at = torch.searchsorted(sums, wanted, right=True).minimum(last)
    tokens = at if order is None else torch.where(nucleus, order.gather(1, at), at)
    greedy = _column([draw.temperature == 0 for draw in draws], scores) > 0
    return torch.where(greedy[:, 0], likeliest, tokens[:, 0]), best


def _filtered(scores: Tensor, chances: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Chances after top-k and top-p, and the order of the scores, the largest first."""
    vocab = scores.shape[1]
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    most = [draw.top_k if 0 < draw.top_k < vocab else vocab for draw in draws]
    least = ordered.gather(1, _column(most, scores).long() - 1)
    chances = torch.where(scores >= least, chances, 0)  # all that tie with the k-th stay
    falling = chances.gather(1, order)
    sums = falling.cumsum(-1, dtype=torch.float64)
    top_p = _column([draw.top_p for draw in draws], scores)
    kept = (sums - falling < top_p * sums[:, -1:]) | (top_p >= 1)
    return torch.zeros_like(chances).scatter(1, order, falling * kept), order


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """fp64 [rows, 1]."""
    return torch.tensor(numbers, dtype=torch.float64).to(like.device)[:, None]
