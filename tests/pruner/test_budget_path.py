"""The knapsack against brute force, and the search along its path against curves of every shape."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from halfweave.pruner.budget.knapsack import Option, Path, find_path, lower_hull, within
from halfweave.pruner.budget.search import smallest_within

Options = dict[str, list[Option]]


def some_options(seed: int, linears: int = 5) -> Options:
    """Random options, some of them worse than another in every way; the largest has no loss."""
    random.seed(seed)
    return {
        f"linear{i}": [
            Option("dense", 100 + i, 0.0),
            *(Option(f"f{j}", random.randint(10, 99), random.random()) for j in range(3)),
        ]
        for i in range(linears)
    }


def best_within(options: Options, limit: int) -> float:
    """The least loss of all choices of at most `limit` bytes."""
    return min(
        sum(o.loss for o in chosen)
        for chosen in itertools.product(*options.values())
        if sum(o.bytes for o in chosen) <= limit
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_as_many_bytes_is_better_than_a_point_of_the_path(seed: int) -> None:
    options = some_options(seed)
    path = find_path(options)
    for point, (size, loss) in enumerate(zip(path.bytes, path.loss, strict=True)):
        chosen = path.chosen(point).values()
        assert sum(o.bytes for o in chosen) == size
        assert sum(o.loss for o in chosen) == pytest.approx(loss)
        assert loss == pytest.approx(best_within(options, size))
    assert path.loss[0] == 0
    assert path.bytes[-1] == sum(min(o.bytes for o in those) for those in options.values())
    assert list(path.bytes) == sorted(path.bytes, reverse=True)
    assert list(path.loss) == sorted(path.loss)


@pytest.mark.parametrize("seed", range(3))
def test_every_reachable_limit_is_kept_and_nearly_as_well_as_can_be(seed: int) -> None:
    options = some_options(seed)
    path = find_path(options)
    dearest = max(step.cost for step in path.steps)
    for limit in range(path.bytes[-1], path.bytes[0] + 10):
        chosen = within(path, limit)
        assert chosen is not None
        assert sum(o.bytes for o in chosen.values()) <= limit
        loss = sum(o.loss for o in chosen.values())
        assert loss <= best_within(options, limit) + dearest
        first = next(i for i, size in enumerate(path.bytes) if size <= limit)
        assert loss <= path.loss[first] + 1e-12
    assert within(path, path.bytes[-1] - 1) is None


def test_room_that_the_last_step_left_is_used() -> None:
    options = {
        "a": [Option("dense", 100, 0.0), Option("x", 20, 8.0)],
        "b": [Option("dense", 30, 0.0), Option("x", 20, 0.9)],
    }
    chosen = within(find_path(options), 60)  # b and then a were taken: 40 bytes; b fits again
    assert chosen is not None
    assert {name: o.format for name, o in chosen.items()} == {"a": "x", "b": "dense"}


def test_options_above_the_hull_are_never_taken() -> None:
    dense, good, poor = Option("dense", 100, 0.0), Option("good", 40, 0.1), Option("poor", 90, 0.5)
    above, least = Option("above", 30, 0.9), Option("least", 20, 1.0)
    assert lower_hull([above, poor, least, good, dense]) == [dense, good, least]
    lossless = Option("lossless", 50, 0.0)
    assert lower_hull([dense, lossless]) == [lossless]


def test_ties_go_by_name_whatever_the_order() -> None:
    same = [Option("dense", 10, 0.0), Option("x", 5, 1.0)]
    forward, backward = (dict.fromkeys(names, same) for names in ("abc", "cba"))
    assert [step.linear for step in find_path(forward).steps] == ["a", "b", "c"]
    assert find_path(forward) == find_path(backward)


def long_path() -> Path:
    return find_path(some_options(7, linears=200))


CURVES: dict[str, Callable[[float], float]] = {
    "as predicted": lambda x: x,
    "far worse": lambda x: 40 * x,
    "far better": lambda x: 0.02 * x,
    "bending up": lambda x: x * x / 4,
    "bending down": lambda x: 3 * math.sqrt(x),
    "better than dense at first": lambda x: x * (x - 8) / 1000,
    "broken behind some point": lambda x: x / 50 if x < 20 else math.inf,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("limit", [math.log(1.05), math.log(1.15), math.log(2)])
def test_the_point_found_is_measured_within_and_close_to_the_furthest(
    curve: str, limit: float
) -> None:
    path, measured = long_path(), {0: 0.0}

    def measure(point: int) -> float:
        assert point not in measured
        measured[point] = CURVES[curve](path.loss[point])
        return measured[point]

    found = smallest_within(path, limit, measure)
    assert len(measured) <= 1 + 7
    assert measured[found] <= limit
    inside = [i for i, loss in enumerate(path.loss) if CURVES[curve](loss) <= limit]
    assert path.bytes[found] <= path.bytes[max(inside)] + 0.05 * path.bytes[0]


def test_an_easy_limit_takes_all_and_an_impossible_one_nothing() -> None:
    path, calls = long_path(), []

    def easy(point: int) -> float:
        calls.append(point)
        return 1e-6 * point

    assert smallest_within(path, 0.1, easy) == len(path.steps)
    assert len(calls) <= 3
    assert smallest_within(path, 0.1, lambda point: 1.0 + point) == 0
    assert smallest_within(find_path({}), 0.1, easy) == 0
