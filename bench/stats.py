"""What is said of many measurements: medians with their spread, and percentiles by one rule."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST = {50: 1, 90: 10, 99: 100}  # values that each rank needs


@dataclass(frozen=True)
class Spread:
    """Median over the repetitions, with the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 of at least one value, linearly interpolated between the raw ones.

    The p-th of n sorted values stands at place p / 100 * (n - 1), counted from 0. Of fewer than 10
    values p90 is None, of fewer than 100 p99: they would be hardly more than the largest.
    """
    found = np.percentile(np.asarray(values, dtype=np.float64), list(_LEAST))
    return {
        f"p{rank}": float(value) if len(values) >= least else None
        for (rank, least), value in zip(_LEAST.items(), found, strict=True)
    }


def distribution(values: Sequence[float]) -> dict[str, float | None] | None:
    """`percentiles` and the mean; None of nothing."""
    if not values:
        return None
    return {**percentiles(values), "mean": statistics.fmean(values)}
