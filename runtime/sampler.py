"""From scores to a token: greedy, or drawn after temperature, top-k, top-p, min-p in that order.

The order and the meaning of each are those of transformers' logits processors, the tests' oracle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import HalfweaveError
from .request import SamplingParams


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
    # By numpy, in this very thread: torch would wake OpenMP's workers for a vocabulary of this
    # size, and those then wait on the cores that the CPU kernels' own threads compute on.
    scores = logits.numpy()
    best = int(scores.argmax())  # of a NaN, if there is one
    if not math.isfinite(scores[best]):
        raise HalfweaveError("the model computed logits that are not numbers")
    if params.greedy:
        return best
    probabilities = torch.softmax(filtered(logits, params), dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Scaled logits [vocab] with -inf for every token that may not be drawn."""
    logits = logits / params.temperature
    if 0 < params.top_k < len(logits):
        threshold = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if params.top_p < 1:
        logits = _nucleus(logits, params.top_p)
    if params.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        floor = params.min_p * probabilities.max()
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    return logits


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens that reaches `top_p`; always at least one."""
    ordered, order = logits.sort(descending=False)
    tail = torch.softmax(ordered, dim=-1).cumsum(dim=-1)
    drop = tail <= 1 - top_p
    drop[-1] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter_(0, order, drop), float("-inf"))
