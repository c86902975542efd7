"""One new token of every sequence looks at its pages of keys and values; plain Triton.

Query heads that share a pair of keys and values (Ainslie et al., 2305.13245) are the rows of one
matrix, filled up to 16. Long sequences are parted among programs, whose softmaxes are put together
afterwards (Flash-Decoding: Dao et al., 2023).
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _floats(stored, scales, where, inside, d, dim, coded: tl.constexpr):
    """Keys or values [B, D] of some rows in fp32, or as they are stored; 0 where not `inside`."""
    there = inside[:, None] & (d < dim)[None, :]
    found = tl.load(stored + where[:, None] * dim + d[None, :], there, other=0)
    if coded:
        found = found.to(tl.float32) * tl.load(scales + where, inside, other=0.0)[:, None]
    return found


@triton.jit(do_not_specialize=["most_pages"])
def attend(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    lengths,
    partial,
    sums,
    factor,
    kv_heads,
    dim,
    most_pages,
    each,
    G: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    page: tl.constexpr,
    coded: tl.constexpr,
):
    """A part of the softmax of every sequence, pair of keys and values, and split.

    Grid: sequences, kv_heads, splits of `each` positions, a multiple of the B that are looked at
    together, which are whole pages. q [sequences, kv_heads G, dim] with dim <= D. partial fp32
    [sequences, kv_heads, splits, 16, D] are unnormalised sums; sums fp32 [sequences, kv_heads,
    splits, 2, 16] the greatest scores, to the base 2, and the sums of the weights. Splits behind a
    sequence's end write nothing.
    """
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    if split * each >= length:
        return
    g, d, t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, B)
    row = (sequence.to(tl.int64) * kv_heads + head) * G
    asked = (g < G)[:, None] & (d < dim)[None, :]
    query = tl.load(q + (row + g)[:, None] * dim + d[None, :], asked, other=0.0)
    most = tl.full((16,), -1e30, tl.float32)
    weights = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, D), tl.float32)
    table = tables + sequence.to(tl.int64) * most_pages
    for start in range(split * each, tl.minimum(split * each + each, length), B):
        at = start + t
        inside = at < length
        number = tl.load(table + at // page, inside, other=0).to(tl.int64)
        where = (number * page + at % page) * kv_heads + head
        key = _floats(keys, key_scales, where, inside, d, dim, coded).to(query.dtype)
        value = _floats(values, value_scales, where, inside, d, dim, coded).to(query.dtype)
        scores = tl.dot(query, tl.trans(key)) * factor
        scores = tl.where(inside[None, :], scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp2(most - higher)
        share = tl.exp2(scores - higher[:, None])
        weights = weights * kept + tl.sum(share, 1)
        mixed = tl.dot(share.to(query.dtype), value, mixed * kept[:, None])
        most = higher
    part = (sequence.to(tl.int64) * kv_heads + head) * tl.num_programs(2) + split
    tl.store(partial + part * 16 * D + g[:, None] * D + d[None, :], mixed)
    tl.store(sums + part * 32 + g, most)
    tl.store(sums + part * 32 + 16 + g, weights)


@triton.jit(do_not_specialize=["splits"])
def join(
    partial,
    sums,
    lengths,
    y,
    kv_heads,
    dim,
    splits,
    each,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
):
    """y [sequences, kv_heads G, dim] from the parts of `attend`, of which there are `splits` <= S.

    Grid: sequences, kv_heads G, one program for each query head.
    """
    sequence, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, g = row // G, row % G
    s, d = tl.arange(0, S), tl.arange(0, D)
    there = s * each < tl.load(lengths + sequence)
    part = (sequence * kv_heads + head) * splits + s
    most = tl.load(sums + part * 32 + g, there, other=-1e30)
    factor = tl.exp2(most - tl.max(most, 0))
    weights = tl.sum(tl.load(sums + part * 32 + 16 + g, there, other=0.0) * factor, 0)
    where = partial + (part * 16 + g)[:, None] * D + d[None, :]
    mixed = tl.sum(tl.load(where, there[:, None], other=0.0) * factor[:, None], 0)
    out = y + (sequence * kv_heads * G + row) * dim + d
    tl.store(out, (mixed / weights).to(y.dtype.element_ty), d < dim)
