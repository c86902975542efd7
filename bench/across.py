"""Whether many things changed together, such as all products of a model between two runs.

A run finds its own state of the machine: where weights came to lie, what others take of the
memory. That moves each product by its own, for all of the run, so that repetitions know nothing of
it, and the products themselves are what is sampled. Each has the change of its medians, weighted by
how steady its repetitions are; the weighted mean is judged by how far the products lie from it
(Hartung and Knapp, 2001), with Student's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .significance import ALPHA, Shift, nearest_none

LEAST_PARTS = 3
_LEAST_SPREAD = 1e-4  # of logarithms: no clock is better


def shift_across(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], floor: float
) -> Shift:
    """Compare positive values of the same things, `LEAST_PARTS` or more, each with repetitions.

    A true ratio between 1 / (1 + floor) and 1 + floor counts as no difference.
    """
    pairs = [
        (np.log(np.asarray(a)), np.log(np.asarray(b))) for a, b in zip(first, second, strict=True)
    ]
    changes = np.array([np.median(b) - np.median(a) for a, b in pairs])
    weights = np.array([1 / (_spread(a) ** 2 + _spread(b) ** 2) for a, b in pairs])
    weights /= weights.sum()
    middle, freedom = float(weights @ changes), len(changes) - 1
    error = math.sqrt(float(weights @ (changes - middle) ** 2) / freedom)
    beyond = abs(middle - nearest_none(middle, floor))
    p = student_p(beyond / error, freedom) if beyond and error else float(not beyond)
    reach = _student_quantile(freedom) * error
    return Shift(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), p)


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t, for a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


def _student_quantile(freedom: int) -> float:
    """The t whose two-sided p is ALPHA."""
    low, high = 0.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > ALPHA else (low, middle)
    return high


def _spread(values: NDArray[np.float64]) -> float:
    """The median distance from the median, as robust as that."""
    return max(_LEAST_SPREAD, float(np.median(np.abs(values - np.median(values)))))
