"""From scores to a token: greedy, or drawn after temperature, top-k, top-p, min-p in that order.

The order and the meaning of each are those of transformers' logits processors, the tests' oracle.
All of it by numpy, in the thread that asks: torch would wake OpenMP's workers for a vocabulary's
size, and those then wait on the cores that the CPU kernels' own threads compute on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import HalfweaveError
from .request import SamplingParams

_FEW = 1024  # tokens that nearly always hold what top-p asks for: only those are sorted then


def make_generator(params: SamplingParams) -> torch.Generator:
    """The request's own source of randomness, so that its neighbours change nothing."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose the next token from fp32 logits [vocab].

    Raises:
        HalfweaveError: the logits hold NaN, +inf, or nothing but -inf.
    """
    scores = logits.numpy()
    best = int(scores.argmax())  # of a NaN, if there is one
    if not math.isfinite(scores[best]):
        raise HalfweaveError("the model computed logits that are not numbers")
    if params.greedy:
        return best
    tokens, chances = candidates(scores, params)
    drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
    sums = chances.cumsum()
    at = int(sums.searchsorted(drawn * sums[-1], side="right"))
    return int(tokens[min(at, len(tokens) - 1)])


def candidates(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, [n], and their probabilities up to a common factor, [n].

    `scores` fp32 [vocab] are finite or -inf, and one at least is finite.
    """
    tokens = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
    scaled = scores[tokens].astype(np.float64) / params.temperature
    chances = np.exp(scaled - scaled.max())
    if params.top_p < 1:
        kept = _nucleus(chances, params.top_p)
        tokens, chances = tokens[kept], chances[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(chances >= params.min_p * chances.max())
        tokens, chances = tokens[kept], chances[kept]
    return tokens, chances


def _nucleus(chances: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of most likely tokens that reaches `top_p`; at least one."""
    many = len(chances) > _FEW
    likely = np.argpartition(chances, -_FEW)[-_FEW:] if many else np.arange(len(chances))
    wanted = top_p * chances.sum()
    if many and chances[likely].sum() < wanted:
        likely = np.arange(len(chances))
    ordered = likely[np.argsort(-chances[likely], kind="stable")]
    before = chances[ordered].cumsum() - chances[ordered]  # what the more likely ones hold
    kept: NDArray[np.int64] = ordered[before < wanted]
    return kept
