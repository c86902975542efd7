"""Cases of the plain Triton kernels, on a GPU or, with TRITON_INTERPRET=1, on the CPU.

Not collected by itself: test_plain.py runs it in a process of its own, since Triton decides once
whether it interprets.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton.language as tl
from halfweave.kernels.cuda import launch, linear, plain_linear, steps
from halfweave.kernels.cuda.dense import dense_of_fragments, dense_of_int4
from halfweave.kernels.cuda.elementwise import gate, rms_norm, rope_and_remember
from halfweave.kernels.cuda.expand_gemm import expand_gemm
from halfweave.kernels.cuda.fragments import from_int4, from_sparse24, from_sparse24_int4
from halfweave.kernels.cuda.int4_gemm import int4_gemm
from halfweave.kernels.cuda.paged_attention import attend, join
from halfweave.kernels.cuda.reduce import add_parts
from halfweave.kernels.cuda.variants import Choice
from halfweave.kernels.formats import Int4, Sparse24, Sparse24Int4
from halfweave.kernels.paging import PAGE_POSITIONS
from torch import Tensor

# In fp16 throughout: the interpreter has no products of bf16.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = {"BN": 64, "BM": 16, "BK": 128}
NONE = torch.zeros(16, device=DEVICE)


# The interpreter cuts bf16 off where a GPU rounds.
ROUNDED = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def pruned(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight and which of it is kept."""
    generator = torch.Generator().manual_seed(rows + columns)
    fours = torch.rand(rows, columns // 4, 4, generator=generator)
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter(2, fours.topk(2).indices, True)
    return torch.randn(rows, columns, generator=generator), keep.view(rows, columns)


def grid(M: int, N: int) -> tuple[int, int]:
    return -(-N // TILE["BN"]), -(-M // TILE["BM"])


def close(found: Tensor, expected: Tensor, bound: float = 2e-3) -> None:
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert float(error) < bound


@pytest.mark.parametrize("group", [0, 128, 64, 32])
@pytest.mark.parametrize(("M", "N", "K"), [(13, 128, 512), (1, 50, 100), (20, 100, 576)])
def test_expanded_products(M: int, N: int, K: int, group: int) -> None:
    weight, keep = pruned(N, K)
    x, bias = random(M, K), random(N)
    if group:
        codes = torch.randint(-8, 8, (N, K))
        scale = torch.rand(N, -(-K // group)).half()
        stored: Any = Sparse24Int4.from_codes(codes, keep, scale, group)
        values, scales = stored.values.to(DEVICE), stored.scale.to(DEVICE)
    else:
        stored = Sparse24.from_dense((weight * keep).half())
        values, scales = stored.values.to(DEVICE), NONE
    y = torch.empty(M, N, dtype=x.dtype, device=DEVICE)
    expand_gemm[grid(M, N)](
        x,
        values,
        stored.meta.to(DEVICE),
        scales,
        bias,
        y,
        M,
        N,
        K,
        **TILE,
        group=group,
        biased=True,
    )
    close(y, x.float() @ stored.unpack().to(DEVICE).T + bias.float())


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize(("M", "N", "K"), [(13, 128, 512), (1, 50, 100)])
def test_dense_4_bit_products(M: int, N: int, K: int, group: int) -> None:
    codes = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(3))
    stored = Int4.from_codes(codes, torch.rand(N, -(-K // group)).half(), group)
    x, wanted = random(M, K), stored.unpack().to(DEVICE).T
    values, scales = stored.values.to(DEVICE), stored.scale.to(DEVICE)
    flags = {"BN": 64, "BM": 16, "group": group, "kind": tl.float16}
    for splits in (1, 2):
        y = torch.empty(splits, M, N, dtype=torch.float32, device=DEVICE)
        each = -(-scales.shape[1] // splits)
        int4_gemm[(*grid(M, N), splits)](
            x.view(torch.int32), values, scales, NONE, y, M, N, K, each, **flags, biased=False
        )
        close(y.sum(0), x.float() @ wanted)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("group", [0, 128, 64, 32])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (50, 100), (200, 576)])
def test_weights_are_written_out_as_they_are_unpacked(
    N: int, K: int, group: int, dtype: torch.dtype
) -> None:
    weight, keep = pruned(N, K)
    if group:
        codes, scale = torch.randint(-8, 8, (N, K)), torch.rand(N, -(-K // group)).half()
        stored: Any = Sparse24Int4.from_codes(codes, keep, scale, group)
        packed = from_sparse24_int4(stored).to(torch.device(DEVICE))
        dense = Int4.from_codes(codes, scale, group)
        both = from_int4(dense).to(torch.device(DEVICE))
        assert torch.equal(dense_of_fragments(both, N, K, dtype).cpu(), dense.unpack(dtype))
        found = dense_of_int4(dense.values.to(DEVICE), dense.scale.to(DEVICE), group, dtype)
        assert torch.equal(found.cpu(), dense.unpack(dtype))
    else:
        stored = Sparse24.from_dense((weight * keep).to(dtype))
        packed = from_sparse24(stored).to(torch.device(DEVICE))
    found = dense_of_fragments(packed, N, K, dtype)
    assert torch.equal(found.cpu(), stored.unpack(dtype))


@pytest.mark.parametrize("splits", [2, 8])
def test_parts_are_added_with_bias_and_residual(splits: int) -> None:
    parts = random(splits, 5, 96, dtype=torch.float32)
    bias, residual = random(96), random(5, 96)
    y = torch.empty(5, 96, dtype=torch.float16, device=DEVICE)
    add_parts[(4,)](
        parts, bias, residual, y, 96, 5 * 96, splits=splits, B=128, biased=True, added=True
    )
    close(y, parts.sum(0) + bias.float() + residual.float())


def test_norms_add_what_a_block_gave_and_keep_the_sum() -> None:
    x, delta, gain = random(4, 100), random(4, 100, seed=1), random(100)
    total = (x.float() + delta.float()).half()
    y = torch.empty_like(x)
    kept, parts = x.clone(), random(3, 4, 100, dtype=torch.float32, seed=2)
    rms_norm[(4,)](x, delta, gain, y, 100, 1e-5, B=128, splits=1)
    assert torch.equal(x, total)
    close(y, torch.nn.functional.rms_norm(total.float(), (100,), gain.float(), 1e-5))
    rms_norm[(4,)](kept, delta, gain, y, 100, 1e-5, B=128, splits=0)
    close(y, torch.nn.functional.rms_norm(kept.float(), (100,), gain.float(), 1e-5))
    total = (kept.float() + parts.sum(0)).half()
    rms_norm[(4,)](kept, parts, gain, y, 100, 1e-5, B=128, splits=3)
    close(kept, total)
    close(y, torch.nn.functional.rms_norm(total.float(), (100,), gain.float(), 1e-5))


@pytest.mark.parametrize("run", [0, 8])
def test_gates_are_silu_times_the_other_half(run: int) -> None:
    for parts in (random(1, 3, 2 * 200), random(4, 3, 2 * 200, dtype=torch.float32)):
        y = torch.empty(3, 200, dtype=torch.float16, device=DEVICE)
        gate[(3, 2)](parts, y, 200, B=128, splits=len(parts), run=run)
        g, u = parts.float().sum(0).view(3, -1, 2, run or 200).unbind(2)
        close(y, torch.nn.functional.silu(g.flatten(1)) * u.flatten(1))


HEADS, KV, DIM, MOST_PAGES = 6, 2, 48, 8


def pages(coded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (3 * MOST_PAGES, PAGE_POSITIONS, KV, DIM)
    kind = torch.int8 if coded else torch.float16
    stored = [torch.zeros(shape, dtype=kind, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(shape[:3], device=DEVICE) for _ in range(2)]
    return stored[0], stored[1], scales[0], scales[1]


def remembered(stored: Tensor, scales: Tensor, coded: bool) -> Tensor:
    return stored.float() * scales[..., None] if coded else stored.float()


@pytest.mark.parametrize(("coded", "parted"), [(False, False), (True, False), (False, True)])
def test_a_sequence_of_tokens_is_remembered_and_attended_to(coded: bool, parted: bool) -> None:
    """Three sequences of different lengths through both kernels, against plain attention."""
    lengths = [7, 64, 113]
    keys, values, key_scales, value_scales = pages(coded)
    order = torch.randperm(3 * MOST_PAGES, generator=torch.Generator().manual_seed(1))
    tables = order.view(3, MOST_PAGES).to(torch.int32)
    frequencies = 1.0 / 10000 ** (torch.arange(0, DIM, 2).float() / DIM)
    rows = [random(length, (HEADS + 2 * KV) * DIM, seed=9) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(torch.int32)
    owners = torch.cat([tables[i].repeat(length, 1) for i, length in enumerate(lengths)])
    qkv = torch.cat(rows)
    q = torch.empty(len(qkv), HEADS, DIM, dtype=torch.float16, device=DEVICE)
    half = qkv.float() / 2
    parts = torch.stack((half, half)) if parted else qkv
    rope_and_remember[(len(qkv), HEADS + 2 * KV)](
        parts,
        positions.to(DEVICE),
        owners.to(DEVICE).contiguous(),
        frequencies.to(DEVICE),
        q,
        keys,
        values,
        key_scales,
        value_scales,
        HEADS,
        KV,
        DIM // 2,
        MOST_PAGES,
        B=32,
        page=PAGE_POSITIONS,
        coded=coded,
        splits=2 if parted else 1,
    )
    last = torch.tensor(lengths).cumsum(0) - 1
    newest = q[last.to(DEVICE)].contiguous()
    splits, each = 2, 64  # positions; behind the end of two sequences nothing is written
    partial = torch.full((3, KV, splits, 16, 64), float("nan"), device=DEVICE)
    sums = torch.full((3, KV, splits, 2, 16), float("nan"), device=DEVICE)
    y = torch.empty(3, HEADS, DIM, dtype=torch.float16, device=DEVICE)
    factor = math.log2(math.e) / math.sqrt(DIM)
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attend[(3, KV, splits)](
        newest,
        keys,
        values,
        key_scales,
        value_scales,
        tables.to(DEVICE),
        counts,
        partial,
        sums,
        factor,
        KV,
        DIM,
        MOST_PAGES,
        each,
        G=HEADS // KV,
        D=64,
        B=32,
        page=PAGE_POSITIONS,
        coded=coded,
    )
    join[(3, HEADS)](partial, sums, counts, y, KV, DIM, splits, each, G=HEADS // KV, D=64, S=2)
    for index, length in enumerate(lengths):
        expected = plain_attention(rows[index].float(), frequencies.to(DEVICE))
        close(y[index], expected, bound=2e-2 if coded else 4e-3)
        own = remembered(keys, key_scales, coded)[tables[index].long()].flatten(0, 1)[:length]
        close(own, plain_keys(rows[index].float(), frequencies.to(DEVICE)), 1e-2)


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(len(x), device=DEVICE)[:, None, None] * frequencies
    first, second = x.chunk(2, -1)
    return torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        -1,
    )


def plain_keys(qkv: Tensor, frequencies: Tensor) -> Tensor:
    heads = qkv.view(len(qkv), HEADS + 2 * KV, DIM)
    return turned(heads[:, HEADS : HEADS + KV], frequencies)


def plain_attention(qkv: Tensor, frequencies: Tensor) -> Tensor:
    """Of the last token: [heads, dim]."""
    heads = qkv.view(len(qkv), HEADS + 2 * KV, DIM)
    query = turned(heads[:, :HEADS], frequencies)[-1]
    keys = plain_keys(qkv, frequencies).repeat_interleave(HEADS // KV, 1)
    values = heads[:, HEADS + KV :].repeat_interleave(HEADS // KV, 1)
    weights = torch.einsum("hd,thd->ht", query, keys).div(math.sqrt(DIM)).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, values)


class Grids:
    """A kernel, and the grids that it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.seen = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.seen.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("tokens", [0, 16, 40])
def test_more_tokens_than_a_grid_has_programs_for(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = Grids(expand_gemm)
    monkeypatch.setattr(launch, "MOST_PROGRAMS", 1)
    monkeypatch.setattr(plain_linear, "expand_gemm", grids)
    weight, keep = pruned(50, 128)
    stored = Sparse24.from_dense((weight * keep).half()).to(torch.device(DEVICE))
    x, bias = random(tokens, 128), random(50)
    y = plain_linear.expanded_linear(x, stored.values, stored.meta, None, bias, 0)
    assert [programs for _, programs in grids.seen] == [1] * -(-tokens // TILE["BM"])
    assert y.shape == (tokens, 50)
    if tokens:
        close(y, x.float() @ stored.unpack().T + bias.float())


def launched() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Whatever launches, with what it may be given; the first is what tells it the device."""
    weight, keep = pruned(64, 128)
    there = torch.device(DEVICE)
    stored = Sparse24.from_dense((weight * keep).half()).to(there)
    packed, codes = from_sparse24(stored), torch.ones(64, 64, dtype=torch.uint8, device=DEVICE)
    x, y, scale = random(3, 128), random(3, 64), random(64, 2)
    q, pages = random(3, 2, 32), steps.Pages.empty(2, 1, 32, torch.float16, there)
    table = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    at, lengths, frequencies = table[:, 0], table[:, 0] + 1, torch.ones(16, device=DEVICE)
    written_out = Choice(None, 1)
    return {
        "multiply": (linear.multiply, (x, packed, 64, None, None, written_out)),
        "multiply_in_parts": (linear.multiply_in_parts, (x, packed, 64, written_out)),
        "multiply_gated": (linear.multiply_gated, (x, packed, 64, None, written_out)),
        "expanded_linear": (
            plain_linear.expanded_linear,
            (x, stored.values, stored.meta, None, None, 0),
        ),
        "int4_linear": (plain_linear.int4_linear, (x, codes, scale, None, 64)),
        "dense_of_int4": (dense_of_int4, (codes, scale, 64, torch.float16)),
        "add_up": (steps.add_up, (torch.ones(2, 3, 64, device=DEVICE), None, None, y)),
        "normed": (steps.normed, (x, None, random(128), 1e-5)),
        "gated": (steps.gated, (x, torch.float16)),
        "remember": (steps.remember, (random(3, 128), at, table, frequencies, pages, q)),
        "attend_newest": (steps.attend_newest, (q, pages, table, lengths, 16)),
    }


@pytest.mark.parametrize("name", launched())
def test_kernels_are_launched_on_the_gpu_of_their_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, given = launched()[name]
    device_of, seen = torch.cuda.device_of, []

    def noted(tensor: Tensor) -> Any:
        seen.append(tensor)
        return device_of(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", noted)
    function(*given)
    assert seen and seen[0].data_ptr() == given[0].data_ptr()


def test_a_weight_is_written_out_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, keep = pruned(64, 128)
    packed = from_sparse24(Sparse24.from_dense((weight * keep).half()).to(torch.device(DEVICE)))
    device_of, seen = torch.cuda.device_of, []
    monkeypatch.setattr(torch.cuda, "device_of", lambda of: seen.append(of) or device_of(of))
    dense = dense_of_fragments(packed, 64, 128, torch.float16)
    assert len(seen) == 1 and seen[0] is dense
