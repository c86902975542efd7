"""Tuning of one block: it learns, it keeps to its masks, and it never makes matters worse."""

from __future__ import annotations

import copy

import pytest
import torch
from halfweave.pruner.recover.blocks import Activations, BlockTuning, TuningResult, tune_block
from torch import Tensor, nn


def forward(block: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = x + block(x)
    return output


def problem() -> tuple[nn.Module, dict[str, Tensor], Activations]:
    """A block whose weights were halved in number, and what the whole one would have given."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    pruned = copy.deepcopy(dense).requires_grad_(False)
    masks = {
        name: p.abs() > p.abs().median() for name, p in pruned.named_parameters() if p.ndim > 1
    }
    for name, mask in masks.items():
        pruned.get_parameter(name).mul_(mask)
    inputs = torch.randn(40, 8, 16)
    with torch.no_grad():
        targets = forward(dense, inputs)
    return pruned, masks, Activations(inputs, targets, held_out=8)


def tune(rate: float = 4e-3, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], TuningResult]:
    block, masks, activations = problem()
    tuning = BlockTuning(epochs=10, seed=seed, learning_rate=rate)
    return block, masks, tune_block(block, masks, activations, forward, tuning)


def test_a_tuned_block_is_nearer_to_the_dense_one_and_keeps_its_masks() -> None:
    block, masks, result = tune()
    assert result.kept and result.after < 0.8 * result.before
    for name, mask in masks.items():
        assert not block.get_parameter(name)[~mask].any()
        assert block.get_parameter(name)[mask].all()
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_a_block_that_got_worse_is_put_back() -> None:
    before = problem()[0].state_dict()
    block, _, result = tune(rate=50.0)
    assert not result.kept
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_loss_that_is_not_finite_counts_as_worse() -> None:
    before = problem()[0].state_dict()
    block, _, result = tune(rate=1e30)
    assert not result.kept
    assert torch.equal(block.state_dict()["0.weight"], before["0.weight"])


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (tune(seed=seed)[0].state_dict()["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_what_is_fixed_stays_as_it_is() -> None:
    block, masks, activations = problem()
    before = block.get_parameter("2.weight").clone()
    others = {name: mask for name, mask in masks.items() if name != "2.weight"}
    tuning = BlockTuning(epochs=10, seed=0)
    result = tune_block(block, others, activations, forward, tuning, fixed={"2.weight"})
    assert result.kept
    assert torch.equal(block.get_parameter("2.weight"), before)


def test_the_errors_are_those_of_the_held_out_windows() -> None:
    block, masks, activations = problem()
    with torch.no_grad():
        lost = (forward(block, activations.inputs[32:]) - activations.targets[32:]).square().sum()
        whole = (activations.targets[32:] - activations.inputs[32:]).square().sum()
    result = tune_block(block, masks, activations, forward, BlockTuning(epochs=1, seed=0))
    assert result.before == pytest.approx(float(lost / whole), rel=1e-5)
