"""y = x W^T for dense 4-bit weights, which mixed checkpoints have beside 2:4 ones; plain Triton.

A byte holds the codes of two neighbouring columns, and so does a word of two tokens' halves: even
and odd columns are multiplied apart, and no code has to change places.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _half(words, shift: tl.constexpr, kind: tl.constexpr):
    """The lower or the upper half of words of 32 bits, as the 16-bit float that it is."""
    return ((words >> shift) & 0xFFFF).to(tl.int16).to(kind, bitcast=True)


@triton.jit(do_not_specialize=["M", "T"])
def int4_gemm(
    x,
    values,
    scale,
    bias,
    y,
    M,
    N,
    K,
    T,
    BN: tl.constexpr,
    BM: tl.constexpr,
    group: tl.constexpr,
    kind: tl.constexpr,
    biased: tl.constexpr,
):
    """y [M, N] = x [M, K] W^T (+ bias [N]); grid ceil(N / BN), ceil(M / BM), splits.

    x is read as pairs int32 [M, K/2] of `kind`; values uint8 [N, K/2], two codes a byte, the lower
    first; scale fp16 [N, ceil(K/group)]. A split has T groups of columns; with several, y is fp32
    [splits, M, N], one part for each.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    half = K // 2
    groups = (K + group - 1) // group
    bytes_of = values + n.to(tl.int64)[:, None] * half
    words_of = x + m.to(tl.int64)[None, :] * half
    sums = tl.zeros((BN, BM), tl.float32)
    for step in range(split * T, tl.minimum(groups, split * T + T)):
        at = step * (group // 2) + tl.arange(0, group // 2)
        inside = (n < N)[:, None] & (at < half)[None, :]
        both = tl.load(bytes_of + at[None, :], inside, other=0x88)
        words = tl.load(words_of + at[:, None], (at < half)[:, None] & (m < M)[None, :], other=0)
        low = (both & 0xF).to(kind) - 8
        high = (both >> 4).to(kind) - 8
        part = tl.dot(low, _half(words, 0, kind))
        part = tl.dot(high, _half(words, 16, kind), part)
        factor = tl.load(scale + n.to(tl.int64) * groups + step, n < N, other=0.0)
        sums += part * factor.to(tl.float32)[:, None]
    if biased:
        sums += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    where = y + (split.to(tl.int64) * M + m)[None, :] * N + n[:, None]
    tl.store(where, sums.to(y.dtype.element_ty), (n < N)[:, None] & (m < M)[None, :])
