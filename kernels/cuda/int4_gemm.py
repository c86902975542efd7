"""y = x W^T for dense 4-bit weights, which mixed checkpoints have beside 2:4 ones; plain Triton."""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def int4_gemm(
    x,
    values,
    scale,
    bias,
    y,
    M,
    N,
    K,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    group: tl.constexpr,
    biased: tl.constexpr,
):
    """y [M, N] = x [M, K] W^T (+ bias [N]); grid ceil(N / BN), ceil(M / BM).

    values uint8 [N, K/2], two codes a byte, the lower first; scale fp16 [N, ceil(K/group)].
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    row = n.to(tl.int64)[:, None]
    groups = (K + group - 1) // group
    sums = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        byte = k // 2 + tl.arange(0, BK // 2)
        inside = (n < N)[:, None] & (byte < K // 2)[None, :]
        both = tl.load(values + row * (K // 2) + byte[None, :], inside, other=0x88)
        s = tl.load(scale + row * groups + (byte * 2 // group)[None, :], inside, other=0.0)
        s = s.to(tl.float32)
        low = ((both & 0xF).to(tl.float32) - 8) * s
        high = ((both >> 4).to(tl.float32) - 8) * s
        dense = tl.interleave(low, high).to(x.dtype.element_ty)
        column = k + tl.arange(0, BK)
        seen = (column < K)[:, None] & (m < M)[None, :]
        tokens = tl.load(x + column[:, None] + m.to(tl.int64)[None, :] * K, seen, other=0.0)
        sums = tl.dot(dense, tokens, sums)
    if biased:
        sums += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + n[:, None] + m.to(tl.int64)[None, :] * N, sums.to(y.dtype.element_ty), inside)
