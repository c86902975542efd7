"""Adds the parts of a product that was split along K, in one order; plain Triton."""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def add_parts(
    parts,
    bias,
    residual,
    y,
    N,
    size,
    splits: tl.constexpr,
    B: tl.constexpr,
    biased: tl.constexpr,
    added: tl.constexpr,
):
    """y [M, N] = sum of parts fp32 [splits, M, N] (+ bias [N]) (+ residual [M, N]); size = M N."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    total = tl.zeros((B,), tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(parts + split * size.to(tl.int64) + at, inside, other=0.0)
    if biased:
        total += tl.load(bias + at % N, inside, other=0.0).to(tl.float32)
    if added:
        total += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), inside)
