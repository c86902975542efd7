"""Whether two sets of repetitions differ, without asking how they are distributed.

The shift is that of Hodges and Lehmann (1963): the median of all differences between one value of
each set, here of logarithms, so that it is a ratio. Its test is Mann and Whitney's, with the exact
distribution of the sum of ranks, ties included; its interval belongs to that test. Many tests are
corrected after Holm (1979).

Repetitions that hang together say less than their number. How much less is known of the mean of
such a series (Bayley and Hammersley, 1946), and taken over to the test of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
_LEAST_SERIES = 5
_MOST_COUNTED = 60
_MOST_CORRELATION = 0.8


@dataclass(frozen=True)
class Shift:
    """How many times as large the second set is, with the interval of 95 % (or what n allows).

    `p` is that of values at least so far apart, although the true ratio is within the floor.
    """

    ratio: float
    low: float
    high: float
    p: float


def shift(
    first: Sequence[float], second: Sequence[float], floor: float = 0.0, inflation: float = 1.0
) -> Shift:
    """Compare two sets of positive values, each with at least one.

    A true ratio between 1 / (1 + floor) and 1 + floor counts as no difference; `inflation` is that
    of `variance_inflation`.
    """
    a, b = np.log(np.asarray(first)), np.log(np.asarray(second))
    differences = np.sort((b[None, :] - a[:, None]).ravel())
    outside = _outside(len(a), len(b))
    low, high = differences[outside], differences[len(differences) - 1 - outside]
    middle, wider = float(np.median(differences)), math.sqrt(inflation)
    nearest = nearest_none(middle, floor)
    apart = floor == 0 or middle != nearest
    p = _inflated(rank_p(list(a + nearest), list(b)), wider) if apart else 1.0
    below, above = (math.exp(middle + wider * (end - middle)) for end in (low, high))
    return Shift(math.exp(middle), below, above, p)


def nearest_none(middle: float, floor: float) -> float:
    """The nearest logarithm of those that count as no difference: values must be apart from it."""
    return min(max(middle, -math.log1p(floor)), math.log1p(floor))


def variance_inflation(series: Sequence[Sequence[float]]) -> float:
    """How many times as much the mean of such a series varies as that of independent values.

    From the correlation of neighbours, by ranks, over all series, less one standard error, since
    so few values show some by chance. Never below 1. Short series show too little of it, which is
    made up for (Marriott and Pope, 1954).
    """
    together = square = 0.0
    pairs, longest = 0, max(map(len, series), default=0)
    for values in series:
        ranks = _doubled_ranks(np.asarray(values, dtype=np.float64)).astype(np.float64)
        ranks -= ranks.mean()
        together += float(ranks[1:] @ ranks[:-1])
        square += float(ranks @ ranks)
        pairs += len(values) - 1
    if longest < _LEAST_SERIES or square == 0:
        return 1.0
    correlation = (longest * together / square + 1) / (longest - 3)
    sure = min(max(0.0, correlation - 1 / math.sqrt(pairs)), _MOST_CORRELATION)
    return (1 + sure) / (1 - sure)


def _inflated(p: float, wider: float) -> float:
    """The p of a value that lies in so many times as wide a distribution."""
    if wider == 1 or not 0 < p < 1:
        return p
    normal = NormalDist()
    return 2 * normal.cdf(normal.inv_cdf(p / 2) / wider)


def rank_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the sum of ranks: by counting all ways to deal them out, or near to that.

    Of more than `_MOST_COUNTED` values the normal distribution is near enough, with the half of a
    step that sums of ranks have.
    """
    values = np.concatenate([np.asarray(first), np.asarray(second)])
    doubled = _doubled_ranks(values)  # whole numbers, ties included
    observed, mean = doubled[: len(first)].sum(), len(first) * doubled.sum() / len(values)
    if len(values) > _MOST_COUNTED:
        deviation = _deviation(doubled, len(first))
        beyond = max(0.0, abs(observed - mean) - 1)
        return 2 * NormalDist().cdf(-beyond / deviation) if deviation else 1.0
    ways = _ways(doubled, len(first))
    sums = np.arange(len(ways))
    extreme = np.abs(sums - mean) >= abs(observed - mean) - 1e-9
    return float(ways[extreme].sum() / ways.sum())


def _deviation(ranks: NDArray[np.int64], count: int) -> float:
    """Standard deviation of the sum of `count` of these, drawn without putting back."""
    share = count * (len(ranks) - count) / (len(ranks) - 1)
    return math.sqrt(share * float(ranks.var()))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p of each test, in their order: below ALPHA for any by chance in 5 % of families."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def least_p(first: int, second: int) -> float:
    """The smallest p that sets of so many values can have."""
    return min(1.0, 2 / math.comb(first + second, first))


def _doubled_ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Twice the rank of each value from 1; equal ones share the mean of theirs."""
    below: NDArray[np.int64] = (values[None, :] < values[:, None]).sum(1)
    equal: NDArray[np.int64] = (values[None, :] == values[:, None]).sum(1)
    return 2 * below + equal + 1


def _ways(ranks: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """How many sets of `count` of the ranks have each sum."""
    ways = np.zeros((count + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1
    for rank in map(int, ranks):
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    found: NDArray[np.float64] = ways[count]
    return found


def _outside(first: int, second: int) -> int:
    """How many of the sorted differences lie outside of the interval at either end.

    Where `below` sums are too small to be chance, it goes from the `below`-th difference to the
    `below`-th from the end, counted from 1 (Moses; Hollander and Wolfe, Nonparametric Statistical
    Methods, 4.3), and leaves 1 out where the test says that there is a difference.
    """
    if first + second > _MOST_COUNTED:
        reach = -NormalDist().inv_cdf(ALPHA / 2)
        deviation = _deviation(np.arange(1, first + second + 1), first)
        return max(0, math.floor(first * second / 2 - reach * deviation - 0.5))
    ways = _ways(2 * np.arange(1, first + second + 1), first)[::2]
    least = first * (first + 1) // 2
    tail = np.cumsum(ways[least:]) / ways.sum()
    below = int((tail <= ALPHA / 2).sum())
    return max(0, min(below - 1, (first * second - 1) // 2))
