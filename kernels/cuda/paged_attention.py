"""One new token of every sequence looks at its pages of keys and values; plain Triton.

Query heads that share a pair of keys and values (Ainslie et al., 2305.13245) are the rows of one
matrix, filled up to 16. Long sequences are parted among programs, whose softmaxes are put together
afterwards (Flash-Decoding: Dao et al., 2023).
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _page(pages, scales, slot, kv_heads, head, d, dim, coded: tl.constexpr):
    """Keys or values [page, D] of one head in fp32, or as they are stored."""
    where = slot * kv_heads + head
    found = tl.load(pages + where[:, None] * dim + d[None, :], (d < dim)[None, :], other=0)
    if coded:
        found = found.to(tl.float32) * tl.load(scales + where)[:, None]
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
    pages_each,
    G: tl.constexpr,
    D: tl.constexpr,
    page: tl.constexpr,
    coded: tl.constexpr,
):
    """A part of the softmax of every sequence, pair of keys and values, and split.

    Grid: sequences, kv_heads, splits of `pages_each` pages. q [sequences, kv_heads G, dim] with
    dim <= D. partial fp32 [sequences, kv_heads, splits, 16, D] are unnormalised sums; sums fp32
    [sequences, kv_heads, splits, 2, 16] the greatest scores, to the base 2, and the sums of the
    weights.
    """
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    g, d, t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, page)
    row = (sequence.to(tl.int64) * kv_heads + head) * G
    asked = (g < G)[:, None] & (d < dim)[None, :]
    query = tl.load(q + (row + g)[:, None] * dim + d[None, :], asked, other=0.0)
    most = tl.full((16,), -1e30, tl.float32)
    weights = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, D), tl.float32)
    begin = split * pages_each
    end = tl.minimum(begin + pages_each, (length + page - 1) // page)
    for at in range(begin, end):
        number = tl.load(tables + sequence.to(tl.int64) * most_pages + at).to(tl.int64)
        slot = number * page + t
        key = _page(keys, key_scales, slot, kv_heads, head, d, dim, coded).to(query.dtype)
        scores = tl.dot(query, tl.trans(key)) * factor
        scores = tl.where((at * page + t < length)[None, :], scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        kept = tl.exp2(most - higher)
        share = tl.exp2(scores - higher[:, None])
        value = _page(values, value_scales, slot, kv_heads, head, d, dim, coded).to(query.dtype)
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
    y,
    kv_heads,
    dim,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """y [sequences, kv_heads G, dim] from the parts of `attend`; grid sequences, kv_heads."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    g, d = tl.arange(0, 16), tl.arange(0, D)
    most = tl.full((16,), -1e30, tl.float32)
    weights = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, D), tl.float32)
    first = (sequence.to(tl.int64) * kv_heads + head) * splits
    for split in range(0, splits):
        own = tl.load(sums + (first + split) * 32 + g)
        higher = tl.maximum(most, own)
        kept, added = tl.exp2(most - higher), tl.exp2(own - higher)
        weights = weights * kept + tl.load(sums + (first + split) * 32 + 16 + g) * added
        part = tl.load(partial + (first + split) * 16 * D + g[:, None] * D + d[None, :])
        mixed = mixed * kept[:, None] + part * added[:, None]
        most = higher
    row = (sequence.to(tl.int64) * kv_heads + head) * G
    asked = (g < G)[:, None] & (d < dim)[None, :]
    where = y + (row + g)[:, None] * dim + d[None, :]
    tl.store(where, (mixed / weights[:, None]).to(y.dtype.element_ty), asked)
