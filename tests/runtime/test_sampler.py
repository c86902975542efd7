"""The sampler against transformers' logits processors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from halfweave.errors import HalfweaveError, RequestError
from halfweave.runtime.likeliest import likeliest, logprob_of, not_below_kth
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.sampler import Sampler, candidates
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
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
    SamplingParams(temperature=2.0, top_p=0.99),
    SamplingParams(temperature=2.0, top_p=0.99999),  # more than what is likely at first sight
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
]
PROMPT, WRITTEN = (3, 5, 5, 9), (7, 7, 7, 9, 11)


def logits(seed: int, size: int = 500) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def scores(seed: int, size: int = 500) -> NDArray[np.float32]:
    found: NDArray[np.float32] = logits(seed, size).numpy()
    return found


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
    for seed, size in [(0, 500), (1, 500), (2, 5000), (3, 50_000)]:
        wanted = oracle(logits(seed, size), params).softmax(-1)
        tokens, chances = candidates(scores(seed, size), params)
        found = torch.zeros(size).double()
        at = slice(None) if tokens is None else torch.from_numpy(tokens)
        found[at] = torch.from_numpy(chances / chances.sum(dtype=np.float64)).double()
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-7)


def changed(params: SamplingParams, ends: tuple[int, ...] = ()) -> Tensor:
    """Scores after everything that comes before temperature, five tokens into an answer."""
    sampler = Sampler(replace(params, temperature=0.0), PROMPT, ends)
    for token in WRITTEN:
        forced = scores(0)
        forced[token] = 1000
        assert sampler.choose(forced) == token
    return torch.from_numpy(sampler._changed(scores(1)).copy())


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_is_discouraged_as_in_transformers(penalty: float) -> None:
    seen = torch.tensor([[*PROMPT, *WRITTEN]])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits(1)[None])[0]
    torch.testing.assert_close(changed(SamplingParams(repetition_penalty=penalty)), wanted)


def test_biases_are_added_as_in_transformers() -> None:
    biases = ((4, 2.5), (90, -100.0))
    processor = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases])
    wanted = processor(torch.zeros(1, 1, dtype=torch.int64), logits(1)[None])[0]
    torch.testing.assert_close(changed(SamplingParams(logit_bias=biases)), wanted)


def test_no_end_comes_too_early_as_in_transformers() -> None:
    written = torch.tensor([[*PROMPT, *WRITTEN]])
    for least in (5, 6):
        processor = MinLengthLogitsProcessor(len(PROMPT) + least, [8, 12], device="cpu")
        wanted = processor(written, logits(1)[None])[0]
        assert torch.equal(changed(SamplingParams(min_tokens=least), ends=(8, 12)), wanted)


def test_presence_and_frequency_count_what_the_answer_has() -> None:
    """OpenAI's formula: mu[j] - c[j] * frequency - (c[j] > 0) * presence; the prompt is no part."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-1.25)
    wanted = logits(1)
    for token, count in Counter(WRITTEN).items():
        wanted[token] -= count * -1.25 + 0.5
    torch.testing.assert_close(changed(params), wanted)


def test_all_changes_together_in_their_order() -> None:
    params = SamplingParams(logit_bias=((7, 3.0),), repetition_penalty=1.5, presence_penalty=1.0)
    wanted = logits(1)
    wanted[7] += 3
    for token in {*PROMPT, *WRITTEN}:
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    wanted[list(set(WRITTEN))] -= 1.0
    torch.testing.assert_close(changed(params), wanted)


def test_the_given_scores_stay_as_they_are() -> None:
    given_scores = scores(1)
    before = given_scores.copy()
    params = SamplingParams(logit_bias=((7, 3.0),), repetition_penalty=1.5, min_tokens=3)
    Sampler(params, PROMPT, (1,)).choose(given_scores)
    assert np.array_equal(given_scores, before)


def test_greedy_takes_the_most_likely_token() -> None:
    assert Sampler(SamplingParams(temperature=0.0)).choose(scores(1)) == int(scores(1).argmax())


def test_equal_seeds_draw_equal_tokens_whatever_others_draw() -> None:
    def draw(seed: int, disturb: bool) -> list[int]:
        sampler, drawn = Sampler(SamplingParams(seed=seed)), []
        for step in range(20):
            drawn.append(sampler.choose(scores(step)))
            if disturb:
                Sampler(SamplingParams(seed=seed)).choose(scores(step))
                np.random.rand(3)
        return drawn

    assert draw(5, disturb=False) == draw(5, disturb=True) != draw(6, disturb=False)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_legal_seed_works(seed: int) -> None:
    Sampler(SamplingParams(seed=seed)).choose(scores(0))


@pytest.mark.parametrize("size", [4, 700])
def test_tokens_are_drawn_as_often_as_they_are_likely(size: int) -> None:
    """Whether they lie in one block of the running sum or in several."""
    spread = np.full(size, -np.inf, np.float32)
    places = [0, size // 2, size - 1]
    spread[places] = [0.0, 1.0, 2.0]
    sampler = Sampler(SamplingParams(seed=1))
    drawn = Counter(sampler.choose(spread) for _ in range(4000))
    likely = torch.tensor([0.0, 1.0, 2.0]).softmax(-1).tolist()
    assert sum(drawn[place] for place in places) == 4000
    for place, probability in zip(places, likely, strict=True):
        assert abs(drawn[place] / 4000 - probability) < 0.03


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    """Row 50."""
    with pytest.raises(HalfweaveError):
        Sampler(SamplingParams(temperature=temperature)).choose(np.full(10, value, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_logit_that_is_no_number_is_an_error(value: float, temperature: float) -> None:
    """Row 50."""
    spoilt = scores(0)
    spoilt[3] = value
    with pytest.raises(HalfweaveError):
        Sampler(SamplingParams(temperature=temperature)).choose(spoilt)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=3000),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_the_largest_are_those_of_sorting(values: list[float], k: int, seed: int) -> None:
    many = np.random.default_rng(seed).permutation(np.resize(np.float32(values), 3000))
    order = sorted(range(len(many)), key=lambda at: (-many[at], at))
    assert likeliest(many, k).tolist() == order[:k]
    assert not_below_kth(many, k).tolist() == [
        at for at in range(len(many)) if many[at] >= many[order[k - 1]]
    ]


def test_log_probabilities_are_those_of_torch() -> None:
    wanted = logits(4, 50_000).double().log_softmax(-1)
    found = logprob_of(scores(4, 50_000), 123, 5)
    tops = wanted.topk(5)
    assert found.logprob == pytest.approx(float(wanted[123]), abs=1e-5)
    assert [token for token, _ in found.top] == tops.indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(tops.values.tolist(), abs=1e-5)
    assert logprob_of(scores(4, 50_000), 123, 0).top == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.5),
        ("presence_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("logit_bias", ((3, 101.0),)),
        ("logit_bias", ((-3, 1.0),)),
        ("logit_bias", ((True, 1.0),)),
        ("logit_bias", tuple((n, 1.0) for n in range(1025))),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", tuple(range(65))),
        ("include_stop", 1),
        ("skip_special_tokens", None),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
