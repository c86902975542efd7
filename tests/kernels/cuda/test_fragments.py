"""Weights in fragment order: torch's own converter agrees, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from halfweave.kernels.cuda.fragments import (
    from_int4,
    from_sparse24,
    from_sparse24_int4,
    unpack,
)
from halfweave.kernels.formats import Int4, Sparse24, Sparse24Int4
from halfweave.kernels.nibbles import gather_kept, kept_indices
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as by_torch,
)


def pruned(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    fours = torch.rand(rows, columns // 4, 4, generator=generator)
    keep = torch.zeros_like(fours).scatter(2, fours.topk(2).indices, 1.0)
    return (weight * keep.view(rows, columns)).half()


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 256)])
def test_metadata_is_what_torch_s_cutlass_converter_makes(rows: int, columns: int) -> None:
    dense = pruned(rows, columns)
    _, reordered = by_torch(dense)
    theirs = np.ascontiguousarray(reordered.numpy()).reshape(-1).view(np.uint32)
    theirs = theirs.reshape(columns // 32, rows)
    ours = from_sparse24(Sparse24.from_dense(dense)).meta.numpy().view(np.uint32)
    for block, k, tile, step, g, half in np.ndindex(rows // 64, columns // 64, 4, 2, 8, 2):
        row = block * 64 + tile * 16
        place = 32 * (row // 32) + 4 * g + 2 * (row // 16 % 2) + half
        word = ours[block, k, 4 * g + 2 * step + half, tile]
        assert theirs[2 * k + step, place] == word


def taken_back(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Kept values [N, K/2] from [N/64, K/64, step, tile, lane, 8], element by element."""
    blocks, columns = values.shape[:2]
    out = torch.zeros(blocks * 64, columns * 32, dtype=values.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for at in range(8):
            row, column = g + 8 * (at // 2 % 2), 2 * t + at % 2 + 8 * (at // 4)
            for step, tile in np.ndindex(2, 4):
                out[16 * tile + row :: 64, 16 * step + column :: 32] = values[
                    :, :, step, tile, lane, at
                ]
    return out[: shape[0], : shape[1] // 2]


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (40, 100), (130, 576)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_stand_where_the_picture_says(rows: int, columns: int, dtype: torch.dtype) -> None:
    dense = pruned(rows, columns).to(dtype)
    packed = from_sparse24(Sparse24.from_dense(dense))
    values = packed.values.view(dtype).view(*packed.blocks, 2, 4, 32, 8)
    kept = gather_kept(dense, kept_indices(dense, "w"))
    assert torch.equal(taken_back(values, (rows, columns)), kept)
    assert packed.shape == (rows, columns)
    assert packed.dtype == dtype


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (50, 100), (128, 320)])
def test_codes_and_scales_stand_where_the_picture_says(rows: int, columns: int, group: int) -> None:
    generator = torch.Generator().manual_seed(1)
    keep = pruned(rows, columns) != 0
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    scale = torch.rand(rows, -(-columns // group), generator=generator).half()
    weight = Sparse24Int4.from_codes(codes, keep, scale, group)
    packed = from_sparse24_int4(weight)
    words = packed.values.transpose(3, 4)[..., None]  # block, columns, step, tile, lane
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])
    values = (words.to(torch.int64) >> shifts & 15) - 8
    kept = gather_kept(torch.where(keep, codes, 0), kept_indices(keep, "w"))
    assert torch.equal(taken_back(values, (rows, columns)), kept)
    assert packed.scales is not None
    for row, at in np.ndindex(rows, scale.shape[1]):
        word = int(packed.scales[row // 64, at, row % 8, row % 64 // 16]) & 0xFFFFFFFF
        bits = word >> 16 if row // 8 % 2 else word & 0xFFFF
        assert bits == int(scale[row, at].view(torch.int16)) & 0xFFFF


def test_what_is_filled_up_adds_nothing_and_says_its_size() -> None:
    packed = from_sparse24(Sparse24.from_dense(pruned(100, 576)))
    assert packed.blocks == (2, 10)
    assert packed.nbytes == 128 * 640 * 9 // 8
    assert int((packed.values != 0).sum()) <= 100 * 576 // 4
    moved = packed.to(torch.device("cpu"))
    assert torch.equal(moved.values, packed.values)


def test_fp32_values_become_fp16() -> None:
    dense = pruned(64, 128)
    packed = from_sparse24(Sparse24.from_dense(dense.float()))
    same = from_sparse24(Sparse24.from_dense(dense))
    assert packed.dtype == torch.float16
    assert torch.equal(packed.values, same.values)


@pytest.mark.parametrize("group", [0, 128, 64, 32])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (50, 100), (130, 576)])
def test_unpacking_gives_the_weight_back(rows: int, columns: int, group: int) -> None:
    dense = pruned(rows, columns)
    if group:
        codes = torch.randint(-8, 8, (rows, columns))
        scale = torch.rand(rows, -(-columns // group)).half()
        stored: Sparse24 | Sparse24Int4 = Sparse24Int4.from_codes(codes, dense != 0, scale, group)
        packed = from_sparse24_int4(stored)
    else:
        stored = Sparse24.from_dense(dense)
        packed = from_sparse24(stored)
    found = unpack(packed, torch.float16)
    assert torch.equal(found[:rows, :columns], stored.unpack(torch.float16))
    assert not found[rows:].any() and not found[:, columns:].any()


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (50, 98), (130, 576), (40, 72)])
def test_a_dense_weight_is_two_sparse_ones(rows: int, columns: int, group: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(0))
    stored = Int4.from_codes(codes, torch.rand(rows, -(-columns // group)).half(), group)
    packed = from_int4(stored)
    found = unpack(packed, torch.float16)
    assert torch.equal(found[:rows, :columns], stored.unpack(torch.float16))
    assert not found[rows:].any() and not found[:, columns:].any()
    assert packed.meta.numel() == 0
