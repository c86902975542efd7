"""GPU operators: what they give on a CPU, what torch knows of them, and how weights are bound."""

from __future__ import annotations

import pytest
import torch
from halfweave.kernels.cuda.binding import SparseLinear, bind, has_kernel
from halfweave.kernels.cuda.fragments import from_sparse24
from halfweave.kernels.cuda.linear import sparse_linear
from halfweave.kernels.cuda.plain_linear import int4_linear
from halfweave.kernels.dispatch import choose
from halfweave.kernels.formats import Dense, Int4, Int8, Sparse24, Sparse24Int4
from halfweave.kernels.reference import linear
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")


def stored(rows: int, columns: int, group: int) -> Sparse24 | Sparse24Int4:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    fours = torch.rand(rows, columns // 4, 4, generator=generator)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter(2, fours.topk(2).indices, True)
    keep = keep.view(rows, columns)
    if not group:
        return Sparse24.from_dense((weight * keep).half())
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    return Sparse24Int4.from_codes(
        codes, keep, torch.rand(rows, -(-columns // group)).half(), group
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (50, 100)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_bound_weight_of_any_shape_gives_what_the_oracle_gives(
    rows: int, columns: int, group: int, dtype: torch.dtype, biased: bool
) -> None:
    weight = stored(rows, columns, group)
    x, bias = torch.randn(2, 3, columns).to(dtype), torch.randn(rows) if biased else None
    y = bind(weight, bias, CPU, dtype)(x)
    wanted = linear(x, weight, bias)
    assert (y.dtype, y.shape) == (dtype, (2, 3, rows))
    assert (
        y.is_contiguous()
    )  # what the next kernel takes for granted, also where rows are filled up
    assert float((y.float() - wanted).norm() / wanted.norm()) < 1e-2


def test_a_residual_is_added_before_rounding() -> None:
    known = stored(64, 128, 0)
    weight = from_sparse24(known)  # type: ignore[arg-type]
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(5, 128, generator=dice).half()
    residual = torch.randn(5, 64, generator=dice).half()
    added = sparse_linear(x, weight.values, weight.meta, None, None, residual, 64, 0)
    exact = x.float() @ known.unpack().T + residual.float()
    # Half of the last place: a sum that was rounded before would be off by up to a whole one.
    torch.testing.assert_close(added.float(), exact, rtol=2**-11 + 1e-5, atol=1e-6)


def test_shapes_are_known_without_a_gpu() -> None:
    weight = SparseLinear.of(stored(50, 100, 64), None, CPU, torch.float16)  # type: ignore[arg-type]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(7, 2, 112, dtype=torch.float16, device="cuda")
        packed: tuple[Tensor, ...] = (weight.weight.values, weight.weight.meta)
        y = sparse_linear(x, *packed, weight.weight.scales, None, None, 64, 64)
        assert (y.shape, y.dtype, y.device.type) == ((7, 2, 64), torch.float16, "cuda")
        codes, scale = torch.empty(48, 56, dtype=torch.uint8), torch.empty(48, 2)
        assert int4_linear(x, codes, scale, None, 64).shape == (7, 2, 48)


def test_the_operator_can_be_part_of_a_compiled_graph() -> None:
    weight = from_sparse24(stored(64, 128, 0))  # type: ignore[arg-type]

    def model(x: Tensor) -> Tensor:
        return sparse_linear(x * 2, weight.values, weight.meta, None, None, None, 64, 0) + 1

    x = torch.randn(3, 128).half()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", ["sparse24", "sparse24_int4", "int4"])
def test_a_bound_weight_can_be_part_of_a_compiled_graph(kind: str) -> None:
    if kind == "int4":
        codes = torch.randint(-8, 8, (64, 128), generator=torch.Generator().manual_seed(0))
        weight: Sparse24 | Sparse24Int4 | Int4 = Int4.from_codes(
            codes, torch.rand(64, 2).half(), 64
        )
    else:
        weight = stored(64, 128, 64 if kind == "sparse24_int4" else 0)
    bias = torch.randn(64).half()
    bound = bind(weight, bias, CPU, torch.float16)
    assert isinstance(bound, SparseLinear)

    def model(x: Tensor) -> Tensor:
        return bound(x * 2) + 1

    x = torch.randn(3, 128).half()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    wanted = linear(2 * x, weight, bias) + 1
    torch.testing.assert_close(
        model(x).float(), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())
    )


def test_dispatch_knows_what_a_gpu_multiplies_as_packed() -> None:
    packed = {
        kind
        for kind in ("sparse24", "sparse24_int4", "int4", "int8", "dense")
        if choose(kind, "cuda").name == "cuda"
    }
    assert packed == {"sparse24", "sparse24_int4", "int4"}
    assert choose("sparse24", "cuda", exact=True).name == "torch-dense"


def test_only_16_bits_have_kernels() -> None:
    weight = stored(64, 128, 0)
    assert has_kernel(weight, torch.float16)
    assert not has_kernel(weight, torch.float32)
    assert not has_kernel(Dense(torch.ones(4, 4)), torch.float16)
    assert not has_kernel(Int8.from_dense(torch.ones(4, 4)), torch.float16)
    assert has_kernel(
        Int4.from_codes(torch.ones(4, 4), torch.ones(4, 1).half(), 32), torch.bfloat16
    )
