"""Magnitude, Wanda and the masks, against loops over single weights."""

from __future__ import annotations

import pytest
import torch
from halfweave.errors import UsageError
from halfweave.kernels.formats import Dense
from halfweave.pruner.judge import Lost, lost
from halfweave.pruner.masks import is_n_of_m, keep_n_of_m
from halfweave.pruner.methods import METHODS, InputStatistics, Target, magnitude, wanda
from halfweave.pruner.methods.base import relative_error
from halfweave.pruner.recipe import METHODS as METHOD_NAMES
from halfweave.pruner.recipe import Pattern, Recipe
from hypothesis import given, settings
from hypothesis import strategies as st


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    x = torch.randn(50, 16, generator=generator) * torch.linspace(0.1, 3, 16)
    return weight, x, InputStatistics(x.T @ x / len(x), len(x))


def target(pattern: str, bits: int = 16) -> Target:
    return Target(Pattern.parse(pattern), bits, 32, 0.01)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), kept=st.integers(1, 7), ties=st.booleans())
def test_exactly_n_of_m_stay_and_they_are_the_largest(seed: int, kept: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(3, 24, generator=generator)
    if ties:
        score = (score * 3).round()
    keep = keep_n_of_m(score, kept, 8).view(3, 3, 8)
    groups = score.view(3, 3, 8)
    assert bool((keep.sum(-1) == kept).all())
    smallest_kept = groups.masked_fill(~keep, 9).amin(-1)
    largest_dropped = groups.masked_fill(keep, -9).amax(-1)
    assert bool((smallest_kept >= largest_dropped).all())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_wanda_compares_weight_times_input_norm_within_each_group(pattern: str) -> None:
    weight, x, statistics = example()
    pruned = wanda.prune(weight, statistics, target(pattern))
    kept, of = Pattern.parse(pattern).kept, Pattern.parse(pattern).of
    for row in range(6):
        for start in range(0, 16, of):
            score = [
                abs(float(weight[row, k])) * float(x[:, k].norm()) for k in range(start, start + of)
            ]
            best = sorted(range(of), key=lambda k, s=score: -s[k])[:kept]
            assert pruned.keep[row, start : start + of].nonzero().flatten().tolist() == sorted(best)
    assert torch.equal(pruned.weight, torch.where(pruned.keep, weight, 0))


def test_wanda_drops_the_same_number_in_every_row_when_unstructured() -> None:
    weight, x, statistics = example()
    pruned = wanda.prune(weight, statistics, target("50%"))
    assert pruned.keep.sum(dim=1).tolist() == [8] * 6
    score = weight.abs() * x.norm(dim=0)
    for row in range(6):
        assert float(score[row][pruned.keep[row]].min()) > float(
            score[row][~pruned.keep[row]].max()
        )


def test_magnitude_takes_one_threshold_for_the_whole_matrix() -> None:
    weight, _, statistics = example()
    pruned = magnitude.prune(weight, statistics, target("50%"))
    dropped = weight.abs()[~pruned.keep]
    # As published: the threshold is the score at index numel/2, and is itself dropped.
    assert len(dropped) == 49
    assert float(dropped.max()) < float(weight.abs()[pruned.keep].min())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_four_bits_round_the_kept_weights_to_their_own_grid(method: str) -> None:
    weight, _, statistics = example()
    pruned = METHODS[method](weight, statistics, target("2:4", bits=4))
    assert pruned.codes is not None and pruned.scale is not None
    kept = torch.where(pruned.keep, weight, 0)
    step = (kept.abs().amax(1, keepdim=True) / 7).half().float()
    assert torch.equal(pruned.scale.float(), step)
    assert bool(((pruned.weight - kept).abs() <= step / 2 + 1e-6).all())


def test_relative_error_is_the_share_of_the_output_that_is_lost() -> None:
    weight, x, statistics = example()
    other = torch.where(weight.abs() > 0.5, weight, 0)
    lost = ((weight - other) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert relative_error(weight, other, statistics.hessian) == pytest.approx(float(lost), rel=1e-4)
    assert relative_error(weight, other, torch.zeros(16, 16)) == 0.0


def test_proof_of_a_pattern() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    assert is_n_of_m(weight, 2, 4)
    assert not is_n_of_m(torch.ones(1, 4), 2, 4)
    assert not is_n_of_m(torch.zeros(1, 6), 2, 4)


@pytest.mark.parametrize("text", ["3", "4:2", "0:4", "2:5", "0%", "100%", "x%", "a:b", ""])
def test_an_impossible_pattern_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        Pattern.parse(text)


def test_a_recipe_survives_json_and_refuses_what_it_does_not_know() -> None:
    recipe = Recipe(method="wanda", pattern="4:8", seed=7)
    assert Recipe.from_json(recipe.to_json()) == recipe
    for wrong in ({"metod": "wanda"}, {"bits": "4"}, {"strict": 1}, {"bits": 3}, {"group": 48}, []):
        with pytest.raises(UsageError):
            Recipe.from_json(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing to do"):
        Recipe(pattern="dense", bits=16)


def test_what_saw_no_token_lost_nothing() -> None:
    nothing = InputStatistics(torch.zeros(8, 8), 0, sample=torch.empty(0, 8))
    kept = Dense(torch.ones(4, 8))
    assert Lost.relative([lost(torch.ones(4, 8), kept, nothing)]) == 0


def test_every_method_of_the_recipe_exists() -> None:
    assert set(METHOD_NAMES) == set(METHODS)
