"""The kernel that is chosen for a format computes what the oracle does."""

from __future__ import annotations

import pytest
import torch
from halfweave.errors import UnsupportedModel
from halfweave.kernels.dispatch import choose, prepare
from halfweave.kernels.formats import (
    FORMATS,
    Dense,
    Int4,
    Int8,
    PackedLinear,
    Sparse24,
    Sparse24Int4,
)
from halfweave.kernels.reference import linear


def example(kind: str) -> PackedLinear:
    """A random weight [12, 40]; groups of 32, so that the last one is short."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 40, generator=generator)
    keep = torch.zeros(12, 10, 4, dtype=torch.bool)
    keep.scatter_(-1, torch.rand(12, 10, 4, generator=generator).argsort(-1)[..., :2], True)
    keep = keep.view(12, 40)
    codes = torch.randint(-8, 8, (12, 40), generator=generator)
    scale = torch.rand(12, 2, generator=generator).half() + 0.1
    return {
        "dense": lambda: Dense(weight),
        "sparse24": lambda: Sparse24.from_dense(weight * keep),
        "sparse24_int4": lambda: Sparse24Int4.from_codes(codes, keep, scale, 32),
        "int4": lambda: Int4.from_codes(codes, scale, 32),
        "int8": lambda: Int8.from_dense(weight),
    }[kind]()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_the_exact_kernel_is_the_oracle(
    kind: str, dtype: torch.dtype, bound: float, bias: bool
) -> None:
    weight = example(kind)
    x, offset = torch.randn(2, 3, 40).to(dtype), torch.randn(12) if bias else None
    y = prepare(weight, offset, torch.device("cpu"), dtype, exact=True)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), linear(x, weight, offset), rtol=bound, atol=8 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_the_fastest_kernel_is_near_the_oracle(kind: str, dtype: torch.dtype) -> None:
    """Inputs in 8 bits at worst: half a step of 127 each, of which 40 with random signs meet."""
    weight, x, offset = example(kind), torch.randn(50, 40).to(dtype), torch.randn(12)
    y = prepare(weight, offset, torch.device("cpu"), dtype)(x)
    wanted = linear(x, weight, offset)
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() < 0.015 * wanted.norm()


def test_every_format_is_multiplied_as_packed_and_codes_say_that_they_round() -> None:
    chosen = {kind: choose(kind, "cpu") for kind in FORMATS}
    assert all(kernel.name.startswith("cpu-") for kernel in chosen.values())
    rounding = {kind for kind, kernel in chosen.items() if "inputs in 8 bits" in kernel.why}
    assert rounding == {"sparse24_int4", "int4", "int8"}
    assert {choose(kind, "cpu", exact=True).name for kind in FORMATS} == {"torch-dense"}


def test_every_choice_has_a_name_and_a_reason() -> None:
    for kind in FORMATS:
        kernel = choose(kind, "cpu")
        assert kernel.name and kernel.why


def test_row_30_a_device_without_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="no kernel for format sparse24 on xpu") as caught:
        choose("sparse24", "xpu")
    assert caught.value.exit_code == 3
