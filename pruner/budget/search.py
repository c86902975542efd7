"""The smallest model on a path whose measured loss keeps to a limit, in a handful of measurements.

Predicted losses rank the points well but are wrong in absolute terms, so they only say where to
look: between the best known good point and the best known bad one, as if the true loss were a
power of the predicted one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from .knapsack import Path

MOST_MEASUREMENTS = 7
_CLOSE_BYTES = 0.003  # of the largest point's bytes: no more is to be gained
_CLOSE_LOSS = 0.03  # of the limit: close enough from below


@dataclass(frozen=True)
class _Known:
    """A point and its measured loss."""

    point: int
    loss: float


def smallest_within(path: Path, limit: float, measure: Callable[[int], float]) -> int:
    """The furthest point found whose measured loss is at most `limit`, above 0.

    `measure(point)` is in nats per token over the dense model. Point 0, everything at its best,
    counts as within and is not measured; every other point that is returned has been.
    """
    last = len(path.steps)
    good, bad = _Known(0, 0.0), _Known(last + 1, math.inf)
    sides: list[bool] = []
    while len(sides) < MOST_MEASUREMENTS and not _settled(path, limit, good, bad):
        one_sided = len(sides) > 1 and sides[-1] == sides[-2]
        guess = _guess(path, limit, good, bad)
        if one_sided or (good.loss <= 0 < good.point and bad.point <= last):
            guess = (good.point + bad.point) // 2  # no such power: do not creep along
        point = min(max(guess, good.point + 1), bad.point - 1)
        loss = measure(point)
        sides.append(loss <= limit)
        good, bad = (_Known(point, loss), bad) if sides[-1] else (good, _Known(point, loss))
    return good.point


def _settled(path: Path, limit: float, good: _Known, bad: _Known) -> bool:
    if bad.point - good.point <= 1 or good.loss >= limit * (1 - _CLOSE_LOSS):
        return True
    apart = path.bytes[good.point] - path.bytes[min(bad.point, len(path.steps))]
    return bad.point <= len(path.steps) and apart <= _CLOSE_BYTES * path.bytes[0]


def _guess(path: Path, limit: float, good: _Known, bad: _Known) -> int:
    """The furthest point that should be within, by what is known so far."""
    near = path.loss[good.point]
    if math.isfinite(bad.loss):
        far = path.loss[bad.point]
        if near > 0 and good.loss > 0 and far > near:
            share = math.log(limit / good.loss) / math.log(bad.loss / good.loss)
            wanted = near * (far / near) ** share
        else:
            wanted = near + (far - near) * (limit - good.loss) / (bad.loss - good.loss)
    elif good.point:
        wanted = near * limit / good.loss if good.loss > 0 else math.inf
    else:
        wanted = limit
    return bisect_right(path.loss, wanted) - 1
