"""The GPU operators on a real device: skipped without one. `make gpu` runs this."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from halfweave.bench.kernel import KernelPlan
from halfweave.bench.kernel_gpu import DENSE, Gpu, bench_gpu
from halfweave.kernels.cuda.binding import SparseLinear, bind
from halfweave.kernels.cuda.choices import choice_on, gpu_device, limits_of
from halfweave.kernels.cuda.linear import GATE_RUN, multiply, multiply_gated, product_of
from halfweave.kernels.cuda.variants import TILES, Product, candidates
from halfweave.kernels.dispatch import prepare
from halfweave.kernels.formats import Int4, PackedLinear
from halfweave.kernels.measured import VARIABLE, write_table
from support.emulated import BOUNDS, DTYPES, Case, sparse_weight
from support.tiny import pack_directory, save_tiny
from torch.nn import functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICE = torch.device("cuda")
TOKENS = (1, 5, 8, 13, 32, 40, 64, 130, 512)
SHAPES = ((64, 128), (576, 576), (1536, 576), (576, 1536), (4096, 4096), (50, 100), (80, 1152))


def error(weight: PackedLinear, tokens: int, kind: str, biased: bool = True) -> float:
    """Of the bound operator, over the greatest result."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(DTYPES[kind])
    bias = torch.randn(rows, generator=generator).to(DTYPES[kind]) if biased else None
    y = bind(weight, bias, DEVICE, DTYPES[kind])(x.to(DEVICE)).float().cpu()
    wanted = x.float() @ weight.unpack().T
    wanted = wanted if bias is None else wanted + bias.float()
    return float((y - wanted).abs().max() / wanted.abs().max())


def weight_of(rows: int, columns: int, kind: str, group: int) -> PackedLinear:
    return sparse_weight(Case(TILES[0], 1, rows, columns, kind, group))


def test_quick_products_are_those_of_the_oracle() -> None:
    for group in (0, 64):
        assert error(weight_of(576, 576, "f16", group), 8, "f16") < BOUNDS["f16"]


def test_this_gpu_has_sparse_tensor_cores() -> None:
    assert limits_of(0) is not None


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("group", [0, 128, 64, 32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_of_any_shape_are_those_of_the_oracle(
    rows: int, columns: int, group: int, kind: str
) -> None:
    weight = weight_of(rows, columns, kind, group)
    for tokens in TOKENS:
        assert error(weight, tokens, kind) < BOUNDS[kind], tokens
    assert error(weight, 3, kind, biased=False) < BOUNDS[kind]


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize(("rows", "columns"), [(200, 320), (50, 98), *SHAPES])
def test_dense_4_bit_products_are_those_of_the_oracle(rows: int, columns: int, group: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(0))
    weight = Int4.from_codes(codes, torch.rand(rows, -(-columns // group)).half(), group)
    for tokens in (1, 17, 64, 200):
        assert error(weight, tokens, "bf16") < BOUNDS["bf16"]


def test_results_do_not_depend_on_the_run() -> None:
    """Parts of a split sum are added in one order."""
    weight = weight_of(576, 4096, "f16", 64)
    apply = prepare(weight, None, DEVICE, torch.float16)
    x = torch.randn(4, 4096, dtype=torch.float16, device=DEVICE)
    first = apply(x)
    assert all(torch.equal(apply(x), first) for _ in range(20))


@pytest.mark.parametrize(("rows", "columns"), [(576, 576), (4096, 1536)])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("tokens", [1, 16, 30, 200])
def test_whatever_may_be_chosen_gives_what_the_oracle_gives(
    tokens: int, group: int, rows: int, columns: int
) -> None:
    weight = weight_of(rows, columns, "f16", group)
    linear = SparseLinear.of(weight, None, DEVICE, torch.float16)  # type: ignore[arg-type]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).half()
    wanted, found = x.float() @ weight.unpack().T, limits_of(0)
    assert found is not None
    for choice in candidates(product_of(x, linear.weight, linear.rows), found[0]):
        y = multiply(x.to(DEVICE), linear.weight, linear.rows, chosen=choice).float().cpu()
        assert (y - wanted).abs().max() < BOUNDS["f16"] * wanted.abs().max(), choice


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("tokens", [1, 16, 30, 200])
def test_whatever_may_be_chosen_lets_through_what_the_oracle_does(
    tokens: int, group: int, biased: bool
) -> None:
    weight = weight_of(3072, 576, "f16", group)
    offset = torch.randn(3072).half().to(DEVICE) if biased else None
    linear = SparseLinear.of(weight, offset, DEVICE, torch.float16)  # type: ignore[arg-type]
    x = torch.randn(tokens, 576, generator=torch.Generator().manual_seed(tokens)).half()
    both = x.float() @ weight.unpack().T
    both = both if offset is None else both + offset.float().cpu()
    g, u = both.view(tokens, -1, 2, GATE_RUN).unbind(2)
    wanted, found = (functional.silu(g) * u).flatten(1), limits_of(0)
    assert found is not None
    for choice in candidates(product_of(x, linear.weight, linear.rows), found[0]):
        given = x.to(DEVICE), linear.weight, linear.rows, offset
        y = multiply_gated(*given, chosen=choice).float().cpu()
        assert (y - wanted).abs().max() < BOUNDS["f16"] * wanted.abs().max(), choice


def test_tiles_that_were_measured_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    packed = pack_directory(save_tiny(tmp_path / "dense"), tmp_path / "packed", "sparse24_int4")
    gpu = Gpu.of(DEVICE)
    result = bench_gpu(str(packed), gpu, KernelPlan(tokens=(1, 40), repetitions=5))
    assert all(row.error < 0.01 and DENSE in row.others for row in result.rows)
    write_table(gpu_device(gpu.number), result.table())
    choice_on.cache_clear()
    for row in result.rows:
        filled = -(-row.N // 16) * 16, -(-row.K // 16) * 16
        chosen = choice_on(gpu.number, Product(row.M, *filled, "bf16", 32))
        assert chosen.name == row.kernel
    choice_on.cache_clear()


def test_an_operator_can_be_captured_in_a_graph() -> None:
    apply = prepare(weight_of(576, 576, "f16", 64), None, DEVICE, torch.float16)
    x = torch.randn(8, 576, dtype=torch.float16, device=DEVICE)
    apply(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = apply(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, apply(x))


def test_a_batch_of_more_tokens_than_a_grid_has_programs_for() -> None:
    """Beyond 2^31 words of x, and results, too: the last of the first launch, and the second's."""
    rows, columns, tokens = 576, 1152, 2**22
    most, found = 65535 * 64, limits_of(0)
    assert found is not None and most < tokens and most * rows > 2**31
    weight = weight_of(rows, columns, "f16", 0)
    linear = SparseLinear.of(weight, None, DEVICE, torch.float16)  # type: ignore[arg-type]
    free, _ = torch.cuda.mem_get_info()
    if free < 2.2 * tokens * (columns + rows):
        pytest.skip("the GPU's memory is too small")
    product = Product(tokens, rows, columns, "f16", 0)
    narrow = next(c for c in candidates(product, found[0]) if c.tile and c.tile.BN == 128)
    x = torch.zeros(tokens, columns, dtype=torch.float16, device=DEVICE)
    some = torch.cat([torch.arange(8), torch.arange(most - 8, most + 8), torch.arange(-8, 0)])
    x[some] = torch.randn(len(some), columns, dtype=torch.float16, device=DEVICE)
    y = multiply(x, linear.weight, rows, chosen=narrow)[some]
    wanted = x[some].float() @ weight.unpack().to(DEVICE).T
    assert float((y.float() - wanted).abs().max() / wanted.abs().max()) < BOUNDS["f16"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here")
def test_products_of_a_second_gpu_are_launched_there() -> None:
    second = torch.device("cuda", 1)
    for kind in (weight_of(576, 576, "f16", 0), weight_of(576, 576, "f16", 64)):
        x = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).half()
        y = bind(kind, None, second, torch.float16)(x.to(second)).float().cpu()
        wanted = x.float() @ kind.unpack().T
        assert float((y - wanted).abs().max() / wanted.abs().max()) < BOUNDS["f16"]
