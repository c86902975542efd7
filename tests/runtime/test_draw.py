"""Tokens drawn for a whole batch by torch, against the sampler that each answer has."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from halfweave.runtime.draw import Draw, drawn_tokens
from halfweave.runtime.params import SamplingParams
from halfweave.runtime.sampler import Sampler

PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=10_000),
    SamplingParams(top_p=0.01),
    SamplingParams(temperature=2.0, top_p=0.99),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.5, top_k=3, min_p=0.3),
]
ROWS = [replace(params, seed=seed) for params, seed in product(PARAMS, range(40))]
SCORES = 3 * torch.randn(len(ROWS), 700, generator=torch.Generator().manual_seed(0))


def test_a_batch_gives_every_row_the_token_of_its_own_sampler() -> None:
    tokens, best = drawn_tokens(SCORES, [Sampler(row).draw() for row in ROWS])
    alone = [Sampler(row).choose(SCORES[at].numpy()) for at, row in enumerate(ROWS)]
    assert tokens.tolist() == alone
    assert torch.equal(best, SCORES.amax(-1))
    assert len(set(alone)) > 100  # the rows are not all alike


def test_a_row_depends_on_no_other() -> None:
    draws = [Sampler(row).draw() for row in ROWS]
    tokens, _ = drawn_tokens(SCORES, draws)
    for at in range(0, len(ROWS), 37):
        assert drawn_tokens(SCORES[at : at + 1], [draws[at]])[0].item() == tokens[at]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2**-53])
def test_what_cannot_be_is_never_drawn(drawn: float, top_p: float) -> None:
    scores = torch.full((1, 600), float("-inf"))
    scores[0, [5, 300]] = torch.tensor([1.0, 0.5])
    tokens, _ = drawn_tokens(scores, [Draw(1.0, top_p=top_p, drawn=drawn)])
    assert tokens.item() in (5, 300)


def test_all_that_tie_with_the_last_of_top_k_may_be_drawn() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    drawn = {
        drawn_tokens(scores, [Draw(1.0, top_k=2, drawn=at / 50)])[0].item() for at in range(50)
    }
    assert drawn == {0, 1, 2, 4}


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_is_told_and_spoils_no_other(spoilt: float) -> None:
    scores = SCORES[:3].clone()
    scores[1, 9] = spoilt
    draws = [Draw(1.0, top_p=0.9, drawn=0.4)] * 3
    tokens, best = drawn_tokens(scores, draws)
    assert best.isfinite().tolist() == [True, False, True]
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 700
    clean, _ = drawn_tokens(SCORES[:3], draws)
    assert tokens[[0, 2]].tolist() == clean[[0, 2]].tolist()
