"""Packed weights to dense ones, for products of so many tokens that a dense one is faster.

A dense product reads a weight once for some hundred tokens, so that writing it out first costs
less than multiplying slower. Plain Triton; the result is thrown away after the product.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _bits(values, kind: tl.constexpr):
    """16-bit floats as the lower bits of int64."""
    return values.to(kind).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def _code(words, scale, kind: tl.constexpr):
    """Of codes + 8 in the lower four bits."""
    return _bits(((words & 15) - 8).to(tl.float32) * scale, kind)


@triton.jit
def _pair(words, scale, kind: tl.constexpr):
    """Two codes 16 bits apart as the lower and the upper half of 32 bits."""
    return _code(words, scale, kind) | (_code(words >> 16, scale, kind) << 16)


@triton.jit
def expand_fragments(
    values,
    meta,
    scales,
    dense,
    N,
    K,
    blocks,
    group: tl.constexpr,
    kind: tl.constexpr,
    both: tl.constexpr,
):
    """dense [N, K] of `kind`, written as int64 [N, K/4], of a weight in fragment order.

    Grid: blocks of 64 rows, blocks of 64 columns, of which the weight has `blocks`, and twice as
    many as the matrix where it is dense (`both`). values, meta and scales are a FragmentWeight's;
    where `group` is 0 values are pairs of `kind`. A lane has of rows g and g + 8 (`h`) the kept
    values of groups t and 4 + t (`q`) of every step `s`; see fragments.py.
    """
    column = tl.program_id(1) * 2 if both else tl.program_id(1)
    block = tl.program_id(0).to(tl.int64) * blocks + column
    e = tl.arange(0, 1024)  # fours of columns
    row, four = e // 16, e % 16
    i, h, g = row // 16, row // 8 % 2, row % 8
    s, q, t = four // 8, four // 4 % 2, four % 4
    lane = 4 * g + t
    if group:
        which = (column * 64 + 4 * four) // group
        first_scale = tl.program_id(0).to(tl.int64) * (blocks * 64 // group)
        halves = tl.load(scales + (first_scale + which) * 32 + g * 4 + i) >> (16 * h)
        scale = (halves & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        at = block * 256 + (s * 32 + lane) * 4 + i
        kept = _pair(tl.load(values + at) >> (4 * (2 * q + h)), scale, kind)
        if both:
            others = _pair(tl.load(values + at + 256) >> (4 * (2 * q + h)), scale, kind)
    else:
        at = block * 1024 + ((s * 4 + i) * 32 + lane) * 4 + 2 * q + h
        kept = tl.load(values + at).to(tl.int64)
    if both:
        four_values = kept | (others << 32)
    else:
        words = tl.load(meta + block * 128 + (4 * g + 2 * s + q) * 4 + i)
        positions = (words >> (16 * h + 4 * t)) & 15
        first, second = kept & 0xFFFF, (kept >> 16) & 0xFFFF
        four_values = (first << (16 * (positions & 3))) | (second << (16 * (positions >> 2)))
    n, k = tl.program_id(0) * 64 + row, tl.program_id(1) * 16 + four
    inside = (n < N) & (k < K // 4)
    tl.store(dense + n.to(tl.int64) * (K // 4) + k, four_values, inside)


@triton.jit
def expand_int4(values, scale, dense, K, B: tl.constexpr, group: tl.constexpr, kind: tl.constexpr):
    """dense [N, K] of `kind`, written as int32 pairs, of dense codes as they are stored.

    Grid: N, ceil(K / 2 B). values uint8 [N, K/2]; scale fp16 [N, ceil(K/group)].
    """
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    inside = at < K // 2
    both = tl.load(values + row * (K // 2) + at, inside, other=0)
    groups = (K + group - 1) // group
    factor = tl.load(scale + row * groups + 2 * at // group, inside, other=0.0).to(tl.float32)
    low = _bits(((both & 15).to(tl.float32) - 8) * factor, kind)
    high = _bits(((both >> 4).to(tl.float32) - 8) * factor, kind)
    tl.store(dense + row * (K // 2) + at, (low | (high << 16)).to(tl.int32), inside)
