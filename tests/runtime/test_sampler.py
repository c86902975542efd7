"""The sampler against transformers' logits processors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from halfweave.errors import HalfweaveError
from halfweave.runtime.request import SamplingParams
from halfweave.runtime.sampler import candidates, make_generator, sample
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

CASES = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.01),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.95),
    SamplingParams(temperature=2.0, top_p=0.99),  # more tokens than are sorted at first
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
]


def logits(seed: int, size: int = 500) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def oracle(scores: Tensor, params: SamplingParams) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    warped: Tensor = warpers(torch.zeros(1, 1, dtype=torch.int64), scores[None])[0]
    return warped


@pytest.mark.parametrize("params", CASES, ids=str)
def test_the_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    for seed, size in [(0, 500), (1, 500), (2, 5000), (3, 5000)]:
        wanted = oracle(logits(seed, size), params).softmax(-1)
        tokens, chances = candidates(logits(seed, size).numpy(), params)
        found = torch.zeros(size).double()
        found[torch.from_numpy(tokens)] = torch.from_numpy(chances / chances.sum())
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-7)


def test_greedy_takes_the_most_likely_token() -> None:
    scores = logits(1)
    params = SamplingParams(temperature=0.0)
    assert sample(scores, params, make_generator(params)) == int(scores.argmax())


def test_equal_seeds_draw_equal_tokens_whatever_others_draw() -> None:
    params = SamplingParams(seed=5)

    def draw(disturb: bool) -> list[int]:
        generator = make_generator(params)
        drawn = []
        for step in range(20):
            drawn.append(sample(logits(step), params, generator))
            if disturb:
                torch.rand(3)
        return drawn

    assert draw(disturb=False) == draw(disturb=True)
    other = SamplingParams(seed=6)
    generator = make_generator(other)
    assert draw(False) != [sample(logits(step), other, generator) for step in range(20)]


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_legal_seed_works(seed: int) -> None:
    params = SamplingParams(seed=seed)
    sample(logits(0), params, make_generator(params))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    params = SamplingParams(seed=1)
    generator = make_generator(params)
    scores = torch.tensor([0.0, 1.0, 2.0, -1e9])
    drawn = Counter(sample(scores, params, generator) for _ in range(4000))
    for token, probability in enumerate(scores.softmax(-1).tolist()):
        assert abs(drawn[token] / 4000 - probability) < 0.03


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    """Row 50."""
    params = SamplingParams(temperature=temperature)
    with pytest.raises(HalfweaveError):
        sample(torch.full((10,), value), params, make_generator(params))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_infinite_logit_is_an_error(temperature: float) -> None:
    """Row 50."""
    params = SamplingParams(temperature=temperature)
    scores = logits(0)
    scores[3] = float("inf")
    with pytest.raises(HalfweaveError):
        sample(scores, params, make_generator(params))
