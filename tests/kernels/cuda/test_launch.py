"""Launches on a GPU that is not there: their grids, their pieces, and what is chosen for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from halfweave.kernels.cuda import launch, linear
from halfweave.kernels.cuda.choices import fastest, stored
from halfweave.kernels.cuda.fragments import FragmentWeight, from_sparse24, unpack
from halfweave.kernels.cuda.launch import MOST_PROGRAMS, pieces
from halfweave.kernels.cuda.targets import ARCHITECTURES
from halfweave.kernels.cuda.variants import TILES, Choice, Product
from halfweave.kernels.formats import Sparse24
from halfweave.kernels.measured import Device, Measured, Table
from support.emulated import Case, sparse_weight
from torch import Tensor

NARROW = TILES[6]


class Launches:
    """In place of the kernel: notes the grids, and multiplies by `weight` as it would."""

    def __init__(self, weight: FragmentWeight | None = None) -> None:
        self.grids: list[tuple[int, int, int]] = []
        self.weight = weight

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        self.grids.append(grid)
        return self._run

    def _run(self, *given: Any, V: Any, **options: Any) -> None:
        x, _, _, _, _, residual, y, M, N, K = given[:10]
        assert (x.shape, y.shape) == ((M, K // 2), (M, N))
        if self.weight is not None:
            found = x.view(torch.float16).float() @ unpack(self.weight, torch.float16).float().T
            y.copy_(found + residual.float())


def weight() -> FragmentWeight:
    known = sparse_weight(Case(NARROW, 1, 64, 128))
    assert isinstance(known, Sparse24)
    return from_sparse24(known)


def test_long_batches_are_launched_in_pieces_that_fit_a_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "sparse_gemm", launches := Launches())
    tokens = 2**22
    x, y = (torch.zeros(1, size).half().expand(tokens, size) for size in (128, 64))
    linear._launch(x, weight(), (None, None), y, Choice(NARROW, 1))
    assert launches.grids == [(1, 65535, 1), (1, 1, 1)]


def test_pieces_are_multiplied_each_with_its_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight()
    monkeypatch.setattr(launch, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(linear, "sparse_gemm", launches := Launches(packed))
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(300, size, generator=generator).half() for size in (128, 64))
    y = torch.empty(300, 64).half()
    linear._launch(x, packed, (None, residual), y, Choice(NARROW, 1))
    assert [grid[1] for grid in launches.grids] == [2, 2, 1]
    wanted = x.float() @ unpack(packed, torch.float16).float().T + residual.float()
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)


def test_k_is_not_parted_where_tokens_take_several_launches() -> None:
    def splits(tokens: int) -> int:
        x: Tensor = torch.zeros(1, 128).half().expand(tokens, 128)
        return linear._settled(x, weight(), 64, Choice(NARROW, 4)).splits

    most = MOST_PROGRAMS * NARROW.BM
    assert (splits(most), splits(most + 1)) == (4, 1)


def test_pieces_are_all_tokens_one_behind_the_other() -> None:
    most = MOST_PROGRAMS * 16
    assert list(pieces(0, 16)) == []
    assert list(pieces(most, 16)) == [slice(0, most)]
    assert list(pieces(most + 3, 16)) == [slice(0, most), slice(most, most + 3)]


def test_no_tokens_have_a_choice_where_some_were_measured() -> None:
    product = Product(0, 4096, 4096, "f16", 0)
    name = "64x8 w1x4x1 s1"
    measured = Measured(1, name, name, {name: 1.0})
    table = Table(Device("a", "b"), {stored(product): (measured,)})
    found = fastest(product, table, ARCHITECTURES[80])
    assert found is not None and found.name == name
