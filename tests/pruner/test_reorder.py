"""Free reordering of an MLP's channels: the order found, and a model that does not notice it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from halfweave.kernels.formats import Dense
from halfweave.pruner.masks import keep_n_of_m
from halfweave.pruner.pipeline import prune
from halfweave.pruner.recipe import Pattern
from halfweave.pruner.solvers.objective import damp
from halfweave.pruner.solvers.reorder import find_order, saliency
from halfweave.runtime.checkpoint import Checkpoint
from support.pruning import recipe
from support.tiny import Tiny, dense_model, save_tiny
from torch import Tensor

MLP = "model.layers.{}.mlp."


def kept(worth: Tensor, order: Tensor, pattern: Pattern) -> float:
    moved = worth[:, order]
    return float(moved[keep_n_of_m(moved, pattern.kept, pattern.of)].sum())


def test_channels_that_matter_for_the_same_rows_are_parted() -> None:
    # Rows want either the first four channels or the last four; in order, half of them is lost.
    worth = torch.zeros(6, 8)
    worth[:3, :4] = worth[3:, 4:] = 1
    pattern = Pattern.parse("2:4")
    order = find_order(worth, pattern)
    assert sorted(order.tolist()) == list(range(8))
    assert kept(worth, torch.arange(8), pattern) == worth.sum() / 2
    assert kept(worth, order, pattern) == worth.sum()


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_keeps_more_than_the_one_there_was(text: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(40, 64, generator=generator).square() + torch.rand(64, generator=generator)
    pattern = Pattern.parse(text)
    order = find_order(worth, pattern)
    assert sorted(order.tolist()) == list(range(64))
    assert kept(worth, order, pattern) > 1.01 * kept(worth, torch.arange(64), pattern)
    assert torch.equal(order, find_order(worth, pattern))


def test_channels_of_huge_worth_leave_an_order_of_all_channels() -> None:
    """Beside them what another pair gains is less than what their own sums are rounded by."""
    for seed in range(12):
        worth = torch.rand(24, 512, generator=torch.Generator().manual_seed(seed))
        worth[:, :2] *= 1e9
        order = find_order(worth.square(), Pattern.parse("2:4"))
        assert sorted(order.tolist()) == list(range(512)), seed


def test_two_groups_come_within_two_percent_of_the_best_of_all_orders() -> None:
    pattern = Pattern.parse("2:4")
    for seed in range(8):
        worth = torch.rand(12, 8, generator=torch.Generator().manual_seed(seed)).square()
        best = max(
            kept(worth, torch.tensor([*first, *(i for i in range(8) if i not in first)]), pattern)
            for first in itertools.combinations(range(8), 4)
        )
        assert kept(worth, find_order(worth, pattern), pattern) > 0.98 * best


def test_saliency_is_the_error_of_removing_one_weight_and_adapting_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    curvature = damp(x.T @ x / 200, 0.01)
    found = saliency(weight, curvature).double()
    hessian = curvature.matrix.double()
    for row, column in itertools.product(range(3), range(6)):
        rest = [i for i in range(6) if i != column]
        w = weight[row].double()
        pull = w[column] * hessian[rest, column]
        change = torch.zeros(6, dtype=torch.float64)
        change[column] = -w[column]
        change[rest] = torch.linalg.solve(hessian[rest][:, rest], pull)
        assert float(change @ hessian @ change) == pytest.approx(
            float(found[row, column]), rel=1e-4
        )


def order_of(original: Tensor, stored: Tensor) -> list[int]:
    """Where each stored row comes from; every row is its own nearest."""
    return torch.cdist(stored.double(), original.double()).argmin(dim=1).tolist()


def test_rows_and_columns_of_every_mlp_change_places_alike(tmp_path: Path) -> None:
    """Gate and up stay dense here, so the order can be read off them; biases go along."""
    model = save_tiny(tmp_path / "dense", Tiny(options={"mlp_bias": True}))
    choices = {f"{MLP.format(i)}down_proj": "sparse24" for i in range(2)}
    result = prune(model, tmp_path / "out", recipe(choices=choices))
    dense, out = dense_model(model), Checkpoint.open(tmp_path / "out")
    for layer in range(2):
        prefix = MLP.format(layer)
        gate, up, down = (f"{prefix}{name}_proj" for name in ("gate", "up", "down"))
        original = {name: dense.get_submodule(name).weight.detach() for name in (gate, up, down)}
        order = order_of(original[gate], out.linear(gate).unpack())
        assert sorted(order) == list(range(len(order))) != order
        assert isinstance(out.linear(up), Dense)
        for name in (gate, up):
            assert torch.equal(out.linear(name).unpack(), original[name][order])
            bias = dense.get_submodule(name).bias.detach()
            assert torch.equal(out.tensor(f"{name}.bias"), bias[order])
        difference = out.linear(down).unpack() - original[down][:, order]
        plain = out.linear(down).unpack() - original[down]
        assert difference.norm() < 0.8 * original[down].norm() < plain.norm()
        assert result.linears[down].format == "sparse24"


@pytest.mark.parametrize("fast", [False, True])
def test_the_order_lowers_the_error_of_what_reads_the_channels(
    tiny_model: Path, tmp_path: Path, fast: bool
) -> None:
    errors = {}
    for reorder in (False, True):
        chosen = recipe(calib_windows=16, reorder=reorder, fast=fast)
        errors[reorder] = prune(tiny_model, tmp_path / str(reorder), chosen).linears
    for name in (f"{MLP.format(layer)}down_proj" for layer in range(2)):
        ours, without = (errors[reorder][name].relative_error for reorder in (True, False))
        assert ours is not None and without is not None
        assert ours < 0.95 * without
    same = f"{MLP.format(0)}gate_proj"
    assert errors[True][same].relative_error == pytest.approx(errors[False][same].relative_error)


@pytest.mark.parametrize("pattern", ["50%", "dense"])
def test_where_there_are_no_groups_nothing_is_reordered(
    tiny_model: Path, tmp_path: Path, pattern: str
) -> None:
    bits, files = 4 if pattern == "dense" else 16, {}
    for reorder in (False, True):
        out = tmp_path / str(reorder)
        prune(tiny_model, out, recipe(pattern=pattern, bits=bits, group=32, reorder=reorder))
        files[reorder] = [file.read_bytes() for file in sorted(out.glob("*.safetensors"))]
    assert files[False] == files[True]
