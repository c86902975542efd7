"""Every numerical step of our own method against an oracle that does it the slow, plain way."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from halfweave.errors import HalfweaveError
from halfweave.kernels.groups import expand_groups
from halfweave.pruner.masks import is_n_of_m, keep_above_quantile
from halfweave.pruner.methods import METHODS, InputStatistics, Target
from halfweave.pruner.methods.base import Lost, mixed_lost, relative_error
from halfweave.pruner.recipe import Pattern
from halfweave.pruner.solvers.alternate import find_support
from halfweave.pruner.solvers.descent import descend, move_groups
from halfweave.pruner.solvers.objective import Objective, damp, make_objective
from halfweave.pruner.solvers.refit import refit
from halfweave.pruner.solvers.scales import refit_scales, search_scales
from halfweave.pruner.solvers.supports import choose_support, quick_support, sorting_network
from halfweave.pruner.solvers.sweep import round_in_order
from torch import Tensor


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are correlated and of unequal energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    energy = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    x = torch.randn(8 * columns, columns, generator=generator) @ (mixing + torch.diag(energy))
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Objective]:
    weight, hessian = layer(rows, columns, seed)
    return weight, make_objective(weight, damp(hessian, 0.01))


def start(
    columns: int = 200, group: int = 64, rows: int = 12
) -> tuple[Tensor, Tensor, Tensor, Objective]:
    """Codes, mask and scales right after the sweep, as descent and refitting find them."""
    weight, objective = problem(rows, columns)
    keep, near = find_support(objective, weight, Pattern.parse("2:4"))
    fitted = refit(objective, near, keep)
    scale = search_scales(fitted, keep, objective.curvature.diagonal, group)
    return round_in_order(objective, fitted, keep, scale, group), keep, scale, objective


def error(objective: Objective, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    return objective.value(codes * expand_groups(scale.float(), group, codes.shape[1]))


def test_the_objective_is_half_the_damped_layer_error_up_to_a_constant() -> None:
    weight, objective = problem(3, 16)
    other = weight + torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    lost = ((weight - other) @ objective.hessian * (weight - other)).sum(1)
    difference = objective.value(other) - objective.value(weight)
    torch.testing.assert_close(difference, lost / 2, rtol=1e-4, atol=1e-4)


def test_mix_one_aims_at_the_dense_models_outputs() -> None:
    """Without a mask the best weight is the regression of X W^T on the inputs it really has."""
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(500, 8, generator=generator)
    now = dense + 0.3 * torch.randn(500, 8, generator=generator)
    weight = torch.randn(4, 8, generator=generator)
    hessian, drift = now.T @ now / 500, (dense - now).T @ now / 500
    objective = make_objective(weight, damp(hessian, 1e-6), drift, mix=1.0)
    found = refit(objective, weight, torch.ones(4, 8, dtype=torch.bool), iterations=50)
    expected = torch.linalg.lstsq(now, dense @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_damping_rises_until_the_hessian_is_usable_and_then_gives_up_aloud() -> None:
    indefinite = torch.eye(4) - 0.02 * torch.ones(4, 4) * 13  # one eigenvalue slightly below zero
    assert damp(indefinite, 0.01).damping > 0.01
    with pytest.raises(HalfweaveError, match="not positive definite, even with damping 10"):
        damp(torch.full((4, 4), float("nan")), 0.01)


def test_the_mixed_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(300, 8, generator=generator)
    now = dense + 0.3 * torch.randn(300, 8, generator=generator)
    weight, other = (torch.randn(4, 8, generator=generator) for _ in range(2))
    moved = dense - now
    statistics = InputStatistics(now.T @ now / 300, 300, moved.T @ now / 300, moved.T @ moved / 300)
    for mix in (0.0, 0.5, 1.0):
        wanted = (now + mix * moved) @ weight.T
        expected = (wanted - now @ other.T).square().sum() / (now @ weight.T).square().sum()
        error = Lost.relative([mixed_lost(weight, other, statistics, mix)])
        assert error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "1:4", "7:8", "5:16"])
def test_the_quick_support_is_the_exact_one(pattern: str) -> None:
    score = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).abs()
    wanted = Pattern.parse(pattern)
    assert torch.equal(quick_support(score, wanted), choose_support(score, wanted))


@pytest.mark.parametrize("count", range(1, 13))
def test_a_sorting_network_sorts(count: int) -> None:
    """What sorts all zeros and ones sorts everything (Knuth, volume 3, 5.3.4, theorem Z)."""
    for values in product((0, 1), repeat=count):
        places = list(values)
        for low, high in sorting_network(count):
            places[low], places[high] = sorted((places[low], places[high]))
        assert places == sorted(values)


@pytest.mark.parametrize("fraction", [0.0, 0.31, 0.5, 0.999])
def test_a_quantile_is_that_of_the_sorted_scores(fraction: float) -> None:
    score = torch.randint(0, 40, (16, 32), generator=torch.Generator().manual_seed(2)).float()
    threshold = score.flatten().sort().values[int(score.numel() * fraction)]
    assert torch.equal(keep_above_quantile(score, fraction), score > threshold)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_refit_is_least_squares_on_the_mask(pattern: str) -> None:
    weight, objective = problem(6, 64)
    keep = choose_support(weight.abs(), Pattern.parse(pattern))
    found = refit(objective, weight, keep, iterations=200)
    for row in range(6):
        on = keep[row]
        system = objective.hessian[on][:, on].double()
        expected = torch.linalg.solve(system, objective.linear[row, on].double())
        torch.testing.assert_close(found[row, on].double(), expected, rtol=1e-2, atol=1e-3)
        assert not found[row, ~on].any()


def test_twenty_iterations_of_refit_come_close() -> None:
    weight, objective = problem(32, 256, seed=3)
    keep = choose_support(weight.abs(), Pattern.parse("2:4"))
    few, many = (refit(objective, weight, keep, iterations=n) for n in (20, 400))
    lost, least = ((objective.value(w) - objective.value(weight)).sum() for w in (few, many))
    assert least <= lost <= 1.01 * least


def test_admm_mostly_finds_the_best_of_all_masks() -> None:
    """Two groups of four have 36 masks: try them all, refitted exactly.

    With so few columns and inputs so unequal a heuristic can miss; real layers have hundreds.
    """
    ratios = []
    for seed in range(20):
        weight, objective = problem(1, 8, seed)
        keep, near = find_support(objective, weight, Pattern.parse("2:4"))
        lost = float(objective.value(refit(objective, near, keep, 60)) - objective.value(weight))
        best = float("inf")
        for first, second in product(combinations(range(4), 2), repeat=2):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, [*first, *(4 + i for i in second)]] = True
            value = objective.value(refit(objective, weight, mask, 60)) - objective.value(weight)
            best = min(best, float(value))
        ratios.append(lost / best)
    assert min(ratios) > 0.999
    assert sum(ratio < 1.001 for ratio in ratios) >= 12


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "50%"])
def test_admm_keeps_to_the_pattern_and_loses_less_than_sparsegpt(pattern: str) -> None:
    weight, hessian = layer(64, 192, seed=4)
    wanted = Target(Pattern.parse(pattern), 16, 64, 0.01)
    statistics = InputStatistics(hessian, 999)
    ours, theirs = (METHODS[m](weight, statistics, wanted) for m in ("admm", "sparsegpt"))
    if wanted.pattern.of:
        assert is_n_of_m(ours.weight, wanted.pattern.kept, wanted.pattern.of)
    else:
        assert float(ours.keep.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert not ours.weight[~ours.keep].any()
    assert relative_error(weight, ours.weight, hessian) < 0.95 * relative_error(
        weight, theirs.weight, hessian
    )


def test_a_column_without_inputs_is_dropped_first_and_harms_nothing() -> None:
    weight, hessian = layer(8, 32)
    hessian[5], hessian[:, 5] = 0, 0
    pruned = METHODS["admm"](
        weight, InputStatistics(hessian, 99), Target(Pattern.parse("2:4"), 16, 64, 0.01)
    )
    assert not pruned.keep[:, 5].any()
    assert torch.isfinite(pruned.weight).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_searched_scales_beat_the_plain_ones_in_weighted_error(group: int) -> None:
    weight, objective = problem(16, 200)
    keep = choose_support(weight.abs(), Pattern.parse("2:4"))
    importance = objective.curvature.diagonal
    found = search_scales(weight, keep, importance, group)
    kept = torch.where(keep, weight, 0)

    def lost(scale: Tensor) -> Tensor:
        wide = expand_groups(scale.float(), group, 200)
        rounded = (kept / wide).round().clamp(-8, 7) * wide
        return ((rounded - kept) ** 2 * importance).sum()

    starts = range(0, 200, group)
    plain = torch.stack([kept[:, s : s + group].abs().amax(1) / 7 for s in starts], 1).half()
    assert found.dtype == torch.float16 and found.shape == plain.shape
    assert lost(found) < 0.9 * lost(plain)


@pytest.mark.parametrize("columns", [128, 200])
def test_refitted_scales_are_the_least_squares_ones(columns: int) -> None:
    codes, _, scale, objective = start(columns)
    fresh = refit_scales(objective, codes, scale, 64)
    for row in range(len(codes)):
        basis = torch.zeros(scale.shape[1], columns, dtype=torch.float64)
        for g in range(scale.shape[1]):
            basis[g, 64 * g : 64 * g + 64] = codes[row, 64 * g : 64 * g + 64]
        expected = torch.linalg.solve(
            basis @ objective.hessian.double() @ basis.T,
            basis @ objective.linear[row].double(),
        )
        torch.testing.assert_close(fresh[row].double(), expected, rtol=2e-3, atol=1e-4)
    assert (error(objective, codes, fresh, 64) <= error(objective, codes, scale, 64)).all()


def test_a_group_without_codes_keeps_its_scale() -> None:
    codes, _, scale, objective = start(128)
    codes[:, 64:] = 0
    fresh = refit_scales(objective, codes, scale, 64)
    assert torch.equal(fresh[:, 1], scale[:, 1])


@pytest.mark.parametrize("columns", [96, 200])
def test_the_sweep_is_the_naive_one_in_order_of_energy(columns: int) -> None:
    """Column by column in fp64, with the Hessian of the columns still to come inverted afresh."""
    weight, objective = problem(8, columns)
    keep = choose_support(weight.abs(), Pattern.parse("2:4"))
    scale = search_scales(weight, keep, objective.curvature.diagonal, 64)
    codes = round_in_order(objective, weight, keep, scale, 64)
    hessian, w = objective.hessian.double(), weight.double().clone()
    energy = hessian.diagonal().view(-1, 4).sum(1)
    order = [4 * int(g) + i for g in energy.argsort(descending=True) for i in range(4)]
    wide = expand_groups(scale.double(), 64, columns)
    expected = torch.zeros_like(w)
    for at, j in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        expected[:, j] = torch.where(keep[:, j], (w[:, j] / wide[:, j]).round().clamp(-8, 7), 0)
        lost = (w[:, j] - expected[:, j] * wide[:, j]) / inverse[0, 0]
        w[:, left] -= lost[:, None] * inverse[0]
    differing = (codes.double() != expected).float().mean()
    assert float(differing) < 0.01  # fp32 against fp64: a tie may fall the other way
    assert not codes[~keep].any()


def test_after_descent_no_single_code_can_be_improved() -> None:
    codes, keep, scale, objective = start(rows=4, columns=64)
    better = descend(objective, codes, keep, scale, 64, sweeps=50)
    before, after = (error(objective, c, scale, 64) for c in (codes, better))
    assert (after <= before + 1e-5).all() and after.sum() < before.sum()
    assert torch.equal(better, better.round()) and better.abs().max() <= 8
    assert not better[~keep].any()
    for j, step in product(range(64), (-1, 1)):
        tried = better.clone()
        tried[:, j] += torch.where(keep[:, j], step, 0)
        legal = (tried[:, j] >= -8) & (tried[:, j] <= 7)
        worse = error(objective, tried, scale, 64) >= after - 1e-4 * after.abs()
        assert (worse | ~legal).all()


def test_moves_of_a_whole_group_find_the_best_pair_and_codes() -> None:
    """One group of four on its own: all 6 * 256 answers can be tried."""
    found_best = 0
    for seed in range(30):
        weight, objective = problem(1, 4, seed)
        scale = (weight.abs().amax(1, keepdim=True) / 7).half()
        keep = torch.tensor([[True, True, False, False]])
        codes = torch.where(keep, (weight / scale.float()).round().clamp(-8, 7), 0)
        moved, mask = move_groups(objective, codes, keep, scale, 32)
        assert int(mask.sum()) == 2 and not moved[~mask].any()
        value = float(error(objective, moved, scale, 32))
        best = float("inf")
        grid = torch.tensor(list(product(range(-8, 8), repeat=2))).float()
        for pair in combinations(range(4), 2):
            tried = torch.zeros(256, 4)
            tried[:, pair] = grid
            single = Objective(objective.curvature, objective.linear.expand(256, 4))
            best = min(best, float(single.value(tried * scale.float()).min()))
        assert value <= float(error(objective, codes, scale, 32)) + 1e-6
        found_best += value <= best + 1e-4 * abs(best)
    assert found_best >= 27


def test_moves_never_lose_and_keep_to_two_of_four() -> None:
    codes, keep, scale, objective = start()
    moved, mask = move_groups(objective, codes, keep, scale, 64)
    assert (error(objective, moved, scale, 64) <= error(objective, codes, scale, 64) + 1e-4).all()
    assert is_n_of_m(mask.float(), 2, 4) and not moved[~mask].any()
    assert not torch.equal(mask, keep)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("pattern", ["2:4", "dense", "50%", "4:8"])
def test_joint_int4_lies_on_its_grid_and_loses_less_than_sparsegpt(
    pattern: str, group: int
) -> None:
    weight, hessian = layer(48, 200, seed=6)
    wanted = Target(Pattern.parse(pattern), 4, group, 0.01)
    statistics = InputStatistics(hessian, 999)
    ours, theirs = (METHODS[m](weight, statistics, wanted) for m in ("admm", "sparsegpt"))
    assert ours.codes is not None and ours.scale is not None
    grid = expand_groups(ours.scale.float(), group, 200)
    assert torch.equal(ours.weight, ours.codes * grid)
    assert torch.equal(ours.codes, ours.codes.round())
    assert ours.codes.min() >= -8 and ours.codes.max() <= 7
    assert relative_error(weight, ours.weight, hessian) < 0.9 * relative_error(
        weight, theirs.weight, hessian
    )


def test_the_answer_is_the_same_every_time() -> None:
    weight, hessian = layer(48, 128, seed=7)
    wanted = Target(Pattern.parse("2:4"), 4, 64, 0.01)
    first, second = (
        METHODS["admm"](weight, InputStatistics(hessian.clone(), 9), wanted) for _ in range(2)
    )
    assert torch.equal(first.weight, second.weight) and torch.equal(first.keep, second.keep)
