"""Tiles of a GPU, measured and looked up, on CPU tensors: by the operators' dense stand-in.

Times are invented by number here: what is shown is which one is taken, and that it is found again.
tests/gpu does the same on a device.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from halfweave.bench.kernel import KernelPlan
from halfweave.bench.products import gpu_products
from halfweave.errors import RefusedError
from halfweave.kernels.measured import VARIABLE, Device, Measured, Table, find_table, write_table
from halfweave.runtime.checkpoint import Checkpoint
from support.tiny import FAMILIES, pack_directory, save_tiny

pytest.importorskip("triton")
from halfweave.bench.kernel_gpu import (
    DENSE,
    Gpu,
    GpuKernelResult,
    Run,
    Timer,
    bench_gpu,
)
from halfweave.kernels.cuda.choices import fastest, stored
from halfweave.kernels.cuda.targets import ARCHITECTURES
from halfweave.kernels.cuda.variants import (
    Product,
    all_variants,
    candidates,
    choose,
)

A100 = ARCHITECTURES[80]
SHAPES = ((576, 576), (1536, 576), (576, 1536), (4096, 14336), (28672, 4096), (64, 128))
FORMATS = ((0, False), (32, False), (64, False), (128, False), (32, True), (128, True))
PLAN = KernelPlan(tokens=(1, 40), repetitions=5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_that_may_be_chosen_is_built_and_the_rules_choice_is_among_it(arch: int) -> None:
    limits = ARCHITECTURES[arch]
    built = {(v.tile, v.group, v.dense, v.splits) for v in all_variants(limits)}
    for M, (N, K), (group, dense) in itertools.product((1, 9, 32, 33, 4096), SHAPES, FORMATS):
        product = Product(M, N, K, "f16", group, dense)
        found = candidates(product, limits)
        assert choose(product, limits, 108) in found
        assert len({choice.name for choice in found}) == len(found)
        for choice in found:
            assert (
                choice.tile is None
                or (
                    choice.tile,
                    group,
                    dense,
                    choice.splits > 1,
                )
                in built
            )


class Late:
    """A timer that is the invented one before its turn: memory is read first."""

    def __init__(self, timer: Timer, after: int) -> None:
        self._timer, self._first, self._left = timer, invented(), after

    def __call__(self, runs: Sequence[Run]) -> Callable[[], float]:
        self._left -= 1
        return self._first(runs) if self._left >= 0 else self._timer(runs)


def invented() -> Callable[[Sequence[Run]], Callable[[], float]]:
    """A timer that runs everything, and for which each thing timed is faster than the last one."""
    numbers = itertools.count()

    def timer(runs: Sequence[Run]) -> Callable[[], float]:
        for run in runs:
            run()
        us = 1000.0 / (1 + next(numbers))
        return lambda: us

    return timer


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights would need ten thousand copies to be out of the caches."""
    monkeypatch.setattr("halfweave.bench.kernel_gpu._COLD_BYTES", 2**14)
    monkeypatch.setattr("halfweave.bench.kernel_gpu._READ_BYTES", 2**16)


@pytest.fixture(scope="module")
def result(packed_model: Path) -> GpuKernelResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfweave.bench.kernel_gpu._COLD_BYTES", 2**14)
        patch.setattr("halfweave.bench.kernel_gpu._READ_BYTES", 2**16)
        return measured(packed_model, invented())


def measured(model: Path, timer: Timer) -> GpuKernelResult:
    return bench_gpu(str(model), Gpu(torch.device("cpu"), A100, timer), PLAN)


def test_products_are_those_of_the_decoder_for_gpus(result: GpuKernelResult) -> None:
    """q, k and v of two layers together, and gate and up."""
    found = [(row.format, row.N, row.K, row.M, row.count) for row in result.rows]
    shapes = ((120, 72), (72, 72), (272, 72), (72, 136))
    assert found == [("sparse24_int4", *shape, m, 2) for shape in shapes for m in (1, 40)]


def test_linears_that_the_decoder_leaves_apart_are_measured_apart(tmp_path: Path) -> None:
    """BLOOM's attention is none for these kernels, which then run one by one."""
    dense = save_tiny(tmp_path / "bloom", FAMILIES["bloom"])
    packed = pack_directory(dense, tmp_path / "out", "sparse24")
    products = gpu_products(Checkpoint.open(packed))
    assert {each.product.format for each in products} == {"sparse24"}
    assert sum(each.count for each in products) == 2 * 6


def test_rows_say_what_was_computed(result: GpuKernelResult) -> None:
    for row in result.rows:
        assert DENSE in row.others
        assert row.error < 0.01
        assert row.kernel not in row.others
        tiles = [each for name, each in row.others.items() if not name.startswith("torch")]
        assert row.us.median <= min(each.us.median for each in tiles)
    body = json.loads(json.dumps(result.body(), allow_nan=False))
    assert "summed up by torch" in body["read_how"]


def test_a_table_of_tiles_is_found_again_and_rules(
    result: GpuKernelResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    device = Device("A card", "of today")
    write_table(device, result.table())
    table = find_table(device)
    assert table is not None
    for row in result.rows:
        rows = -(-row.N // 16) * 16
        columns = -(-row.K // 16) * 16
        product = Product(row.M, rows, columns, "bf16", 32)
        chosen = fastest(product, table, A100)
        assert chosen is not None
        assert chosen.name == row.kernel
    assert fastest(Product(1, 4096, 4096, "bf16", 32), table, A100) is None


def test_a_tile_that_there_is_not_is_no_choice(result: GpuKernelResult) -> None:
    product, measured = result.tiles[0]
    known = Product(1, product.N, product.K, "bf16", 32)
    strange = type(measured)(1, "7x7 w1x1x1 s1", "x", {"x": 1.0})
    assert fastest(known, Table(Device("a", "b"), {product: (strange,)}), A100) is None


def test_a_model_without_packed_linears_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RefusedError, match="no packed linears"):
        measured(tiny_model, invented())


def test_tiles_without_room_are_left_out_and_told(packed_model: Path) -> None:
    first = invented()

    def without_a_dense_one(runs: Sequence[Run]) -> Callable[[], float]:
        chosen = getattr(runs[0], "keywords", {}).get("chosen")
        if chosen is not None and chosen.tile is None:
            raise RuntimeError("out of memory\nwith a long story")
        return first(runs)

    def without_any(runs: Sequence[Run]) -> Callable[[], float]:
        raise RuntimeError("out of memory")

    found = measured(packed_model, without_a_dense_one)
    assert all("written out" not in row.others for row in found.rows)
    assert "written out of 40 tokens was left out: out of memory" in found.notes
    with pytest.raises(RefusedError, match="of 1 tokens cannot be timed: written out of 1 tokens"):
        measured(packed_model, Late(without_any, 1))


@pytest.mark.parametrize(
    ("tokens", "taken"),
    [(1, 1), (2, 1), (3, None), (9, 16), (16, 16), (31, 32), (33, 64), (100, 64), (400, 512)],
)
def test_a_measurement_speaks_for_about_as_many_tokens(tokens: int, taken: int | None) -> None:
    """None but the rule speaks for three: one is too far, and what serves 16 is no tile for it."""
    product = Product(tokens, 4096, 4096, "bf16", 64)
    rows = []
    for each in (1, 16, 32, 64, 512):
        name = candidates(replace(product, M=each), A100)[-1].name
        rows.append(Measured(each, name, name, {name: 1.0}))
    found = fastest(product, Table(Device("a", "b"), {stored(product): tuple(rows)}), A100)
    wanted = {row.M: row.choice for row in rows}.get(taken or 0)
    assert (found and found.name) == wanted
