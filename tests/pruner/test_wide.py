"""Models whose matrices are too large for copies of them: rows at a time, Hessians in place."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from halfweave.errors import CapacityError
from halfweave.kernels.formats import Dense
from halfweave.pruner import rows, spill, stream, walk
from halfweave.pruner.judge import Lost, lost
from halfweave.pruner.methods.base import InputStatistics
from halfweave.pruner.pipeline import plan_prune, prune
from halfweave.pruner.rows import StoredLinear
from halfweave.pruner.solvers.factor import inverse_factor
from halfweave.pruner.solvers.wide import add_gram, factorize, mirror
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import everything, recipe
from torch import Tensor, nn


def hessian(columns: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator)
    x *= torch.rand(columns, generator=generator) * 3
    x[:, 7] = 0
    return x.T @ x / tokens


@pytest.mark.parametrize("columns", [32, 100, 128])
def test_a_factor_in_place_is_the_one_that_lapack_finds(columns: int) -> None:
    whole = hessian(columns, 400)
    expected, damping = inverse_factor(whole, 0.01)
    found = whole.clone()
    assert factorize(found, 0.01, block=32) == damping
    assert expected is not None
    assert torch.allclose(found.triu(), expected, atol=1e-5)
    assert torch.equal(found.tril(-1), whole.tril(-1))


def test_damping_rises_until_a_hessian_is_positive_definite() -> None:
    whole = torch.eye(64) - torch.full((64, 64), 0.025)
    expected, damping = inverse_factor(whole, 0.01)
    found = whole.clone()
    assert factorize(found, 0.01, block=16) == damping == 1.0
    assert expected is not None
    assert torch.allclose(found.triu(), expected, atol=1e-5)
    assert factorize(-100 * torch.eye(64), 0.01, block=16) is None


def test_a_gram_matrix_is_summed_by_its_upper_half() -> None:
    parts = [torch.randn(50, 70) for _ in range(2)]
    total = torch.zeros(70, 70)
    for part in parts:
        add_gram(total, part, block=32)
    mirror(total, block=32)
    x = torch.cat(parts)
    assert torch.allclose(total, x.T @ x, atol=1e-4)


def test_a_linear_computes_in_its_inputs_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = nn.Linear(12, 10), torch.randn(2, 3, 12)
    stored = StoredLinear(12, 10)
    stored.load_state_dict(plain.state_dict())
    assert torch.equal(stored(x), plain(x))
    stored.weight.data = stored.weight.data.bfloat16()
    plain.weight.data = plain.weight.data.bfloat16().float()
    assert torch.equal(stored(x), plain(x))
    monkeypatch.setattr(rows, "MOST_WEIGHTS", 48)
    assert torch.allclose(stored(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_rows_solved_a_few_at_a_time_are_those_of_the_whole(
    method: str, bits: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(method=method, bits=bits)
    whole = prune(tiny_model, tmp_path / "whole", asked)
    monkeypatch.setattr(rows, "MOST_WEIGHTS", 7 * 72)
    parts = prune(tiny_model, tmp_path / "parts", asked)
    first, second = Checkpoint.open(whole.path), Checkpoint.open(parts.path)
    for name, record in whole.linears.items():
        one, other = first.linear(name).unpack(), second.linear(name).unpack()
        assert torch.equal(one != 0, other != 0), name
        assert (one - other).norm() < 0.05 * one.norm(), name
        assert parts.linears[name].relative_error == pytest.approx(record.relative_error, rel=0.05)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_a_wide_linear_is_pruned_as_any_other(
    method: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 136 inputs in one model and 72 in the other, where both are called wide."""
    asked = recipe(method=method, calib_windows=16, mix=0.0)
    usual = prune(tiny_model, tmp_path / "usual", asked)
    monkeypatch.setattr(walk, "WIDE", 100)
    monkeypatch.setattr(walk, "SAMPLED_FROM", 100)
    wide = prune(tiny_model, tmp_path / "wide", asked)
    first, second = Checkpoint.open(usual.path), Checkpoint.open(wide.path)
    name = "model.layers.0.mlp.down_proj"
    one, other = first.linear(name).unpack(), second.linear(name).unpack()
    assert ((one != 0) == (other != 0)).float().mean() > 0.99
    assert (one - other).norm() < 0.05 * one.norm()
    error = usual.linears[name].relative_error
    assert wide.linears[name].relative_error == pytest.approx(error, rel=0.1)
    assert wide.linears[name].baseline_error is None  # SparseGPT would use the Hessian up


def test_an_error_is_that_of_sampled_inputs_where_the_hessian_is_gone() -> None:
    x, weight, changed = torch.randn(30, 16), torch.randn(8, 16), torch.randn(8, 16)
    full = InputStatistics(x.T @ x / 30, 30)
    gone = InputStatistics(torch.zeros(16, 16), 30, sample=x, wide=True)
    expected, found = (lost(weight, Dense(changed), fit) for fit in (full, gone))
    assert found.lost == pytest.approx(expected.lost, rel=1e-4)
    assert Lost.relative([found]) == pytest.approx(Lost.relative([expected]), rel=1e-4)


def test_activations_on_the_disk_change_nothing_and_leave_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tiny_model, tmp_path / "memory", recipe())
    before = plan_prune(tiny_model, recipe())
    monkeypatch.setattr(spill, "SPILLED_FROM", 1)
    after = plan_prune(tiny_model, recipe())
    assert after.scratch_bytes == before.scratch_bytes + 2 * 4 * 4 * 32 * 72
    assert after.peak_memory_bytes < before.peak_memory_bytes
    prune(tiny_model, tmp_path / "disk", recipe())
    assert everything(tmp_path / "disk") == everything(tmp_path / "memory")


def test_a_disk_without_room_for_activations_is_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill, "SPILLED_FROM", 1)
    monkeypatch.setattr(spill.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match="activations"):
        prune(tiny_model, tmp_path / "out", recipe())


def test_fewer_tokens_go_through_a_very_wide_block_at_a_time() -> None:
    assert stream.tokens_per_batch(1536) == 4096
    assert stream.tokens_per_batch(49152) * 49152 <= 2**26
