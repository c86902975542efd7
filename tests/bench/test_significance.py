"""The statistics that comparisons rest on, against tables and other ways to count."""

from __future__ import annotations

import numpy as np
import pytest
from halfweave.bench.across import shift_across, student_p
from halfweave.bench.significance import ALPHA, holm, least_p, rank_p, shift, variance_inflation


def test_p_is_the_share_of_all_ways_to_deal_out_the_ranks() -> None:
    """Five below five: 2 of 252 ways; scipy.stats.mannwhitneyu says the same of the others."""
    low, high = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]
    assert rank_p(low, high) == pytest.approx(2 / 252) == least_p(5, 5)
    assert rank_p(high, low) == pytest.approx(2 / 252)
    assert rank_p([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0, 9.0]) == pytest.approx(0.4126984)
    assert rank_p(low, low) == 1.0  # ties
    assert rank_p([1.0], [2.0]) == 1.0


def test_of_many_repetitions_the_normal_distribution_is_near_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counting would take memory with the third power of their number."""
    dice = np.random.default_rng(0)
    for far in (0.0, 0.3, 0.8):
        first, second = list(dice.lognormal(0, 1, 20)), list(dice.lognormal(far, 1, 25))
        exact = shift(first, second, 0.01)
        with monkeypatch.context() as patched:
            patched.setattr("halfweave.bench.significance._MOST_COUNTED", 0)
            near = shift(first, second, 0.01)
        assert near.p == pytest.approx(exact.p, rel=0.1, abs=0.001)
        assert (near.ratio, near.low) == pytest.approx((exact.ratio, exact.low), rel=0.02)
    many = [list(dice.lognormal(far, 0.1, 2000)) for far in (0.0, 0.05)]
    assert shift(*many).p < 1e-10
    assert rank_p([1.0] * 40, [1.0] * 40) == 1.0  # ties


def test_a_floor_is_tested_for_not_cut_off() -> None:
    """Apart, but not surely by more than the floor: the values overlap when it is taken away."""
    first, second = [1.0, 1.01, 1.02, 1.03], [1.04, 1.05, 1.06, 1.07]
    assert shift(first, second).p == pytest.approx(least_p(4, 4))
    assert shift(first, second, 0.03).p > 0.2
    assert shift(first, second, 0.05).p == 1.0
    assert shift(second, first, 0.03).p == pytest.approx(shift(first, second, 0.03).p)


def test_the_shift_is_the_median_ratio_and_lies_in_its_interval() -> None:
    found = shift([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert found.ratio == pytest.approx(2.0)
    dice = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        a, b = dice.lognormal(0, 0.1, 7), 1.2 * dice.lognormal(0, 0.1, 7)
        each = shift(list(a), list(b))
        inside += each.low <= 1.2 <= each.high
        assert each.low <= each.ratio <= each.high
    assert inside >= 184  # 95 % of 200, less three times the spread of that


@pytest.mark.parametrize("counts", [(5, 5), (7, 7), (11, 6)])
def test_the_interval_leaves_1_out_where_the_test_finds_a_difference(
    counts: tuple[int, int],
) -> None:
    dice = np.random.default_rng(1)
    found = [
        shift(list(dice.lognormal(0, 0.1, counts[0])), list(dice.lognormal(far, 0.1, counts[1])))
        for far in (0.0, 0.1)
        for _ in range(150)
    ]
    apart = [not each.low <= 1 <= each.high for each in found]
    assert apart == [each.p <= ALPHA for each in found]
    assert 0 < sum(apart) < len(found)


def test_turns_that_hang_together_say_less_than_their_number() -> None:
    """States that last for some turns are few looks, however many turns they had them."""
    dice = np.random.default_rng(0)

    def series(memory: float) -> list[float]:
        values = [float(dice.normal())]
        for _ in range(10):
            values.append(memory * values[-1] + (1 - memory**2) ** 0.5 * float(dice.normal()))
        return values

    free, bound = ([series(memory) for _ in range(24)] for memory in (0.0, 0.6))
    assert variance_inflation(free) < 1.3
    assert 2.0 < variance_inflation(bound) < 4.0  # 4 is (1 + 0.6) / (1 - 0.6)
    assert variance_inflation([[1.0] * 7, [2.0] * 7]) == 1.0
    assert variance_inflation([[1.0, 2.0, 3.0, 4.0]]) == 1.0  # too few to tell
    first, second = [1.0, 1.1, 1.2, 1.3, 1.4], [1.5, 1.6, 1.7, 1.8, 1.9]
    sure, unsure = shift(first, second), shift(first, second, inflation=4.0)
    assert (sure.p, sure.ratio) == (least_p(5, 5), unsure.ratio)
    assert unsure.p == pytest.approx(0.184, abs=0.001)  # half of its 2.66 standard deviations
    assert unsure.low < sure.low < sure.high < unsure.high


def test_students_distribution_is_that_of_the_tables() -> None:
    """Abramowitz and Stegun, table 26.10."""
    for freedom, t in ((1, 12.706), (2, 4.303), (5, 2.571), (8, 2.306), (35, 2.030)):
        assert student_p(t, freedom) == pytest.approx(0.05, abs=0.0001)
    assert student_p(0.0, 3) == 1.0
    assert student_p(1e9, 4) == 0.0


def test_a_change_across_things_is_weighed_by_how_steady_each_is() -> None:
    steady, restless = [1.0, 1.001, 0.999], [1.0, 1.5, 0.6]
    first = [steady, steady, steady, restless]
    second = [[1.1 * each for each in part] for part in first]
    all_alike = shift_across(first, second, 0.03)
    assert all_alike.ratio == pytest.approx(1.1)
    assert all_alike.p < 1e-6
    second[3] = [3 * each for each in restless]
    found = shift_across(first, second, 0.03)
    assert found.ratio == pytest.approx(1.1, abs=0.001)
    second[2] = steady
    assert shift_across(first, second, 0.03).p > 0.05  # two of three say so, and one does not
    assert shift_across(first, first, 0.03).p == 1.0


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
