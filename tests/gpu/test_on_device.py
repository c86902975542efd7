"""The GPU operators on a real device: skipped without one. `make gpu` runs this."""

from __future__ import annotations

import pytest
import torch
from halfweave.kernels.cuda.binding import bind
from halfweave.kernels.cuda.linear import limits_of
from halfweave.kernels.cuda.variants import TILES
from halfweave.kernels.dispatch import prepare
from halfweave.kernels.formats import Int4, PackedLinear
from support.emulated import BOUNDS, DTYPES, Case, sparse_weight

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


def test_a_batch_of_one_more_than_32_bits_of_bytes() -> None:
    weight = weight_of(64, 1024, "f16", 0)
    free, _ = torch.cuda.mem_get_info()
    tokens = 2**22
    if free < 2 * tokens * 1024 * 2:
        pytest.skip("the GPU's memory is too small")
    x = torch.zeros(tokens, 1024, dtype=torch.float16, device=DEVICE)
    x[-8:] = torch.randn(8, 1024, dtype=torch.float16, device=DEVICE)
    y = bind(weight, None, DEVICE, torch.float16)(x)[-8:]
    wanted = x[-8:].float() @ weight.unpack().to(DEVICE).T
    assert float((y.float() - wanted).abs().max() / wanted.abs().max()) < BOUNDS["f16"]
