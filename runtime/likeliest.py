"""Finding the few largest of many scores without sorting them all. By numpy, in one thread.

torch would wake OpenMP's workers for a vocabulary's size, and those then wait on the cores that
the CPU kernels' own threads compute on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .request import TokenLogprob

_BLOCK = 256


def not_below_kth(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices, rising, of all scores that are at least the k-th largest; 0 < k <= their number."""
    likely = _superset(scores, k)
    few = scores[likely]
    kept: NDArray[np.int64] = likely[few >= np.partition(few, -k)[-k]]
    return kept


def likeliest(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices of the k largest, the largest first; of equal ones the earlier."""
    if k == 0:
        return np.empty(0, np.int64)
    likely = not_below_kth(scores, k)
    order = np.argsort(-scores[likely], kind="stable")
    first: NDArray[np.int64] = likely[order][:k]
    return first


def logprob_of(scores: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Log-probability of a token by these scores [vocab], and of the `top` likeliest ones."""
    largest = scores.max()
    total = float(largest) + float(np.log(np.exp(scores - largest).sum(dtype=np.float64)))
    best = likeliest(scores, min(top, len(scores)))
    return TokenLogprob(
        token,
        float(scores[token]) - total,
        tuple((int(each), float(scores[each]) - total) for each in best),
    )


def _superset(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices that hold the k largest: k blocks have a largest score of at least the bound."""
    blocks = len(scores) // _BLOCK
    if k >= blocks:
        return np.arange(len(scores))
    largest = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(1)
    return np.flatnonzero(scores >= np.partition(largest, -k)[-k])
