"""Every format: exact bytes, round trips, and refusal of every illegal field."""

from __future__ import annotations

import pytest
import torch
from halfweave.errors import CheckpointError
from halfweave.kernels.formats import (
    FORMATS,
    Dense,
    Int4,
    Int8,
    PackedLinear,
    Sparse24,
    Sparse24Int4,
    expected_tensors,
    from_tensors,
)
from halfweave.kernels.reference import linear
from hypothesis import given, settings
from hypothesis import strategies as st

# All six legal pairs of positions, in the order (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def sparse_weight(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A random 2:4 matrix; some groups have one or no non-zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    weight.view(rows, columns // 4, 4).scatter_(-1, order[..., :2], 0)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return weight


def random_codes(rows: int, columns: int, group: int, seed: int) -> Sparse24Int4:
    generator = torch.Generator().manual_seed(seed)
    keep = sparse_weight(rows, columns, seed, torch.float32) != 0
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    groups = -(-columns // group)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    return Sparse24Int4.from_codes(codes, keep, scale, group)


def examples() -> list[PackedLinear]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (6, 40), generator=generator)
    scale = torch.rand(6, 2, generator=generator).half() + 0.1
    return [
        Dense(torch.randn(6, 40, generator=generator)),
        Sparse24.from_dense(sparse_weight(6, 40, 1, torch.bfloat16)),
        random_codes(6, 40, 32, 2),
        Int4.from_codes(codes, scale, 32),
        Int8.from_dense(torch.randn(6, 40, generator=generator)),
    ]


def test_sparse24_has_these_exact_bytes() -> None:
    weight = torch.zeros(1, 24, dtype=torch.bfloat16)
    for group, (first, second) in enumerate(PAIRS):
        weight[0, 4 * group + first] = 2 * group + 1
        weight[0, 4 * group + second] = 2 * group + 2
    packed = Sparse24.from_dense(weight)
    assert packed.meta.tolist() == [[0x84, 0x9C, 0xED]]
    assert packed.values.tolist() == [[float(i) for i in range(1, 13)]]


def test_sparse24_int4_has_these_exact_bytes() -> None:
    codes = torch.tensor([[-8, 0, 0, 7, 0, 1, -1, 0]])
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    packed = Sparse24Int4.from_codes(codes, codes != 0, scale, 32)
    assert packed.values.tolist() == [[0xF0, 0x79]]
    assert packed.meta.tolist() == [[0x9C]]
    assert packed.unpack().tolist() == [[-4.0, 0, 0, 3.5, 0, 0.5, -0.5, 0]]


def test_int4_has_these_exact_bytes() -> None:
    codes = torch.tensor([[-8, 7, 0, 1]])
    packed = Int4.from_codes(codes, torch.tensor([[2.0]], dtype=torch.float16), 32)
    assert packed.values.tolist() == [[0xF0, 0x98]]
    assert packed.unpack().tolist() == [[-16.0, 14.0, 0.0, 2.0]]


def test_int8_rounds_to_127_levels_a_side() -> None:
    packed = Int8.from_dense(torch.tensor([[-127.0, 127.0, 63.4, 0.0]]))
    assert packed.values.tolist() == [[-127, 127, 63, 0]]
    assert packed.scale.tolist() == [[1.0]]


def test_an_odd_number_of_groups_ends_in_the_padding_nibble() -> None:
    packed = Sparse24.from_dense(torch.zeros(2, 12))
    assert packed.meta.tolist() == [[0x44, 0x44], [0x44, 0x44]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_24_matrix_survives_packing(
    rows: int, groups: int, seed: int, dtype: torch.dtype
) -> None:
    weight = sparse_weight(rows, 4 * groups, seed, dtype)
    packed = Sparse24.from_dense(weight)
    packed.validate("w")
    assert torch.equal(packed.unpack(dtype), weight)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    group=st.sampled_from([32, 64, 128]),
)
def test_any_codes_survive_packing_with_ragged_groups(
    rows: int, groups: int, seed: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = 4 * groups
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    scale = (torch.rand(rows, -(-columns // group), generator=generator) + 0.1).half()
    keep = sparse_weight(rows, columns, seed, torch.float32) != 0
    packed = Sparse24Int4.from_codes(codes, keep, scale, group)
    packed.validate("w")
    each = torch.stack([scale[:, k // group] for k in range(columns)], dim=1).float()
    assert torch.equal(packed.unpack(), torch.where(keep, codes, 0) * each)
    dense = Int4.from_codes(codes, scale, group)
    dense.validate("w")
    assert torch.equal(dense.unpack(), codes * each)


@pytest.mark.parametrize("packed", examples(), ids=lambda packed: packed.kind)
def test_tensors_put_together_again_are_the_same_weight(packed: PackedLinear) -> None:
    group = getattr(packed, "group", None)
    again = from_tensors(packed.kind, packed.tensors(), packed.shape, group, "w")
    assert torch.equal(again.unpack(), packed.unpack())
    shapes = {suffix: tuple(t.shape) for suffix, t in packed.tensors().items()}
    assert shapes == expected_tensors(packed.kind, packed.shape, group)


@pytest.mark.parametrize("packed", examples(), ids=lambda packed: packed.kind)
def test_the_oracle_multiplies_by_the_unpacked_weight(packed: PackedLinear) -> None:
    x, bias = torch.randn(3, 40), torch.randn(6)
    expected = torch.stack([packed.unpack().double() @ row.double() for row in x]) + bias
    torch.testing.assert_close(linear(x, packed, bias), expected.float(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=120)
@given(row=st.integers(0, 4), column=st.integers(0, 4), byte=st.integers(0, 255))
def test_row_21_a_changed_meta_byte_is_legal_or_refused(row: int, column: int, byte: int) -> None:
    packed = Sparse24.from_dense(sparse_weight(5, 40, 7, torch.float32))
    packed.meta[row, column] = byte
    if {byte & 0xF, byte >> 4} <= set(NIBBLES):
        packed.validate("w")
    else:
        with pytest.raises(CheckpointError, match=r"w\.meta: nibble .* in row"):
            packed.validate("w")


def test_row_21_a_wrong_padding_nibble_is_refused() -> None:
    packed = Sparse24.from_dense(torch.zeros(2, 12))
    packed.meta[1, 1] = 0x84
    with pytest.raises(CheckpointError, match="row 1"):
        packed.validate("w")


def test_row_21_three_nonzeros_in_a_group_are_refused_when_packing() -> None:
    weight = torch.zeros(3, 8)
    weight[2, 4:7] = 1
    with pytest.raises(CheckpointError, match="row 2, the four columns at 4"):
        Sparse24.from_dense(weight, "w")


def test_row_5_a_width_that_is_no_multiple_of_four_is_refused_when_packing() -> None:
    with pytest.raises(CheckpointError, match="K = 6 is not a multiple of 4"):
        Sparse24.from_dense(torch.zeros(3, 6), "w")


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan"), float("inf")])
def test_row_22_an_illegal_scale_is_refused(bad: float) -> None:
    packed = random_codes(4, 80, 32, 5)
    packed.scale[3, 2] = bad
    with pytest.raises(CheckpointError, match=r"w\.scale is .* at \[3, 2\]"):
        packed.validate("w")


def test_row_22_a_wrong_number_of_groups_is_refused() -> None:
    packed = random_codes(4, 80, 32, 5)
    with pytest.raises(CheckpointError, match=r"expected torch.float16 \[4, 2\]"):
        from_tensors(packed.kind, packed.tensors(), packed.shape, 64, "w")


@pytest.mark.parametrize("packed", examples(), ids=lambda packed: packed.kind)
def test_row_20_any_tensor_of_another_shape_or_dtype_is_refused(packed: PackedLinear) -> None:
    group = getattr(packed, "group", None)
    for suffix, tensor in packed.tensors().items():
        for wrong in (tensor[:-1], tensor[:, :-1], tensor.flatten(), tensor.to(torch.int32)):
            tensors = {**packed.tensors(), suffix: wrong}
            with pytest.raises(CheckpointError, match="w"):
                from_tensors(packed.kind, tensors, packed.shape, group, "w")


def test_a_missing_tensor_is_named() -> None:
    packed = random_codes(4, 80, 32, 5)
    tensors = packed.tensors()
    del tensors["scale"]
    with pytest.raises(CheckpointError, match=r"\['scale'\] of format sparse24_int4"):
        from_tensors(packed.kind, tensors, packed.shape, 32, "w")


def test_nonfinite_packed_values_are_refused() -> None:
    packed = Sparse24.from_dense(sparse_weight(5, 40, 7, torch.float32))
    packed.values[4, 19] = float("inf")
    with pytest.raises(CheckpointError, match=r"w\.values is not finite at \[4, 19\]"):
        packed.validate("w")


def test_bits_per_weight_are_as_promised() -> None:
    weight = sparse_weight(64, 1024, 0, torch.bfloat16)
    assert Sparse24.from_dense(weight).nbytes * 8 == 9 * weight.numel()
    for group in (128, 64, 32):
        packed = random_codes(64, 1024, group, 0)
        assert packed.nbytes * 8 == (3 + 16 / group) * weight.numel()


def test_the_table_of_formats_is_closed() -> None:
    assert set(FORMATS) == {"dense", "sparse24", "sparse24_int4", "int4", "int8"}
