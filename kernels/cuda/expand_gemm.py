"""y = x W^T for 2:4 weights without sparse tensor cores: tiles become dense ones in registers.

For GPUs that have no mma.sp, and, since it is plain Triton, for the interpreter: the same engine
then runs on a CPU. Weights are read as the checkpoint has them. Several times the instructions of
sparse_gemm.py, so never the first choice where that runs.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _nibbles(bytes_):
    """uint8 [N, C] to [N, 2C], the lower half of each byte first."""
    return tl.interleave(bytes_ & 0xF, bytes_ >> 4)


@triton.jit
def _kept_floats(values, n, k, N, K, BK: tl.constexpr):
    """The first and the second kept value of every four: [BN, BK/4] each."""
    column = k // 2 + tl.arange(0, BK // 2)
    inside = (n < N)[:, None] & (column < K // 2)[None, :]
    kept = tl.load(values + n.to(tl.int64)[:, None] * (K // 2) + column[None, :], inside, other=0.0)
    return tl.split(tl.reshape(kept, (n.shape[0], BK // 4, 2)))


@triton.jit
def _kept_codes(values, scale, n, k, N, K, BK: tl.constexpr, group: tl.constexpr):
    """The same of codes, scaled, in fp32."""
    column = k // 4 + tl.arange(0, BK // 4)
    inside = (n < N)[:, None] & (column < K // 4)[None, :]
    row = n.to(tl.int64)[:, None]
    both = tl.load(values + row * (K // 4) + column[None, :], inside, other=0x88)
    groups = (K + group - 1) // group
    s = tl.load(scale + row * groups + (column * 4 // group)[None, :], inside, other=0.0)
    first = (both & 0xF).to(tl.float32) - 8
    second = (both >> 4).to(tl.float32) - 8
    return first * s.to(tl.float32), second * s.to(tl.float32)


@triton.jit
def _spread(first, second, meta):
    """Kept values to a dense tile [BN, BK]. Positions increase: no first is 3, no second 0."""
    i0, i1, none = meta & 3, meta >> 2, tl.zeros_like(first)
    d0 = tl.where(i0 == 0, first, none)
    d1 = tl.where(i0 == 1, first, tl.where(i1 == 1, second, none))
    d2 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, none))
    d3 = tl.where(i1 == 3, second, none)
    return tl.interleave(tl.interleave(d0, d2), tl.interleave(d1, d3))


@triton.jit(do_not_specialize=["M"])
def expand_gemm(
    x,
    values,
    meta,
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

    values [N, K/2] floats, or codes uint8 [N, K/4] where `group` is not 0; meta uint8
    [N, ceil(K/8)]; scale fp16 [N, ceil(K/group)].
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    sums = tl.zeros((BN, BM), tl.float32)
    for k in range(0, K, BK):
        byte = k // 8 + tl.arange(0, BK // 8)
        inside = (n < N)[:, None] & (byte < (K + 7) // 8)[None, :]
        row = n.to(tl.int64)[:, None] * ((K + 7) // 8)
        positions = _nibbles(tl.load(meta + row + byte[None, :], inside, other=0))
        if group:
            first, second = _kept_codes(values, scale, n, k, N, K, BK, group)
        else:
            first, second = _kept_floats(values, n, k, N, K, BK)
        dense = _spread(first, second, positions).to(x.dtype.element_ty)
        column = k + tl.arange(0, BK)
        seen = (column < K)[:, None] & (m < M)[None, :]
        tokens = tl.load(x + column[:, None] + m.to(tl.int64)[None, :] * K, seen, other=0.0)
        sums = tl.dot(dense, tokens, sums)
    if biased:
        sums += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + n[:, None] + m.to(tl.int64)[None, :] * N, sums.to(y.dtype.element_ty), inside)
