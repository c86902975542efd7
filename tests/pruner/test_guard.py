"""Whose answer is taken for a linear, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from halfweave.kernels.formats import Dense
from halfweave.pruner.guard import solve_guarded
from halfweave.pruner.journal import LinearRecord
from halfweave.pruner.linear import Linear, Solver
from halfweave.pruner.methods import METHODS, InputStatistics, Target
from halfweave.pruner.methods.base import Lost, Pruned, mixed_lost, relative_error
from halfweave.pruner.recipe import Pattern
from halfweave.pruner.tasks import Here
from halfweave.pruner.walk import Observation


def test_the_guard_takes_whichever_is_better_on_windows_that_neither_saw() -> None:
    """Two check sets, each made so that the other of the two solutions is the better one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    fit = InputStatistics(x.T @ x / 200, 200)
    target = Target(Pattern.parse("2:4"), 16, 64, 0.01)
    ours, theirs = (METHODS[m](weight, fit, target).weight for m in ("admm", "sparsegpt"))
    winners = set()
    for direction in (*(weight - ours), *(weight - theirs)):
        check = InputStatistics(torch.outer(direction, direction), 1)
        solved = solve_guarded("admm", weight, fit, check, target)
        errors = [relative_error(weight, w, check.hessian) for w in (ours, theirs)]
        expected = ours if errors[0] <= errors[1] else theirs
        assert torch.equal(solved.pruned.weight, expected)
        assert solved.held_out_error == pytest.approx(min(errors), rel=1e-5)
        assert solved.baseline_error == pytest.approx(errors[1], rel=1e-5)
        winners.add(solved.method)
    assert winners == {"admm", "sparsegpt"}


@pytest.mark.parametrize("checked", [False, True])
def test_a_hopeless_hessian_leaves_the_choice_to_sparsegpt(checked: bool) -> None:
    """Row 9: it falls back to magnitude then, and says so."""
    generator = torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(8, 32, generator=generator), -torch.eye(32)
    check = InputStatistics(torch.eye(32), 1) if checked else None
    target = Target(Pattern.parse("2:4"), 16, 32, 0.01)
    solved = solve_guarded("admm", weight, InputStatistics(hessian, 10), check, target)
    assert solved.method == "sparsegpt"
    assert "not positive definite" in solved.pruned.note
    assert "magnitude" in solved.pruned.note
    assert torch.equal(solved.pruned.weight != 0, solved.pruned.keep)


class _Two(Here):
    """Tasks that are done here, by as many as two."""

    workers = 2


def test_what_is_said_of_a_linear_is_of_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are solved by themselves may have losses, and methods, of their own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    weight[:32] *= 1000
    mixing = torch.randn(64, 64, generator=generator)
    inputs = [torch.randn(count, 64, generator=generator) @ mixing for count in (256, 64)]
    fit, check = (InputStatistics(x.T @ x / len(x), len(x)) for x in inputs)
    target = Target(Pattern.parse("dense"), 4, 32, 0.01)

    def recorded() -> LinearRecord:
        began = LinearRecord("dense", (64, 64), None, "none", None)
        linear = Linear("l", target, Dense(weight), began, 32, fit)
        Solver("admm", False, False).begin(_Two(), linear, weight, Observation(fit, check))()
        stored = linear.packed.unpack()
        error = Lost.relative([mixed_lost(weight, stored, check, 0.0)])
        assert linear.record.held_out_error == pytest.approx(error, rel=1e-3)
        return linear.record

    assert recorded().method == "admm"
    real = METHODS["admm"]

    def bad_at_loud_ones(rows: torch.Tensor, seen: InputStatistics, wanted: Target) -> Pruned:
        found = real(rows, seen, wanted)
        if rows.abs().max() < 100:
            return found
        assert found.codes is not None
        return replace(found, weight=found.weight * 0, codes=found.codes * 0)

    monkeypatch.setitem(METHODS, "admm", bad_at_loud_ones)
    assert recorded().method == "admm and sparsegpt"
