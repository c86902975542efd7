"""y = x W^T for 2:4 weights, on sparse tensor cores.

One program computes BM tokens x BN rows of W. Its warps share the work along rows (WN), along K
(WK) and along tokens (WM); 64 WK columns are a step:

             64 columns a warp, WK side by side
          +-----------+-----------+
    W  64 | warp 0    | warp 1    |   x^T [64 WK, BM]  ->  a tile [64, BM] each, added at the end
          +-----------+-----------+

Several steps (`stages`) are in shared memory at once: all but one are on their way from global
memory (cp.async) while one is multiplied. The loop over stages is unrolled, since with the numbers
of stages known at compile time one barrier a step is enough. The next copy is started right behind
it, before anything of the current step is read: started later it keeps the compiler from moving
reads, and large tiles spill registers.

Weights come in fragment order (fragments.py), so that a lane's 16 bytes of shared memory are its
operand; tokens through ldmatrix. Codes become halves in registers. Their scales are applied to the
sums of a step, in fp32, where there are few tokens (`scale_sums`), else to the weights, which
rounds their product once.

Knows neither models nor formats; `variants.py` says which tiles there are.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .assembly import DEQUANT_OPERANDS, MMA_OPERANDS, dequant_text, mma_text
from .layouts import contiguous, fragments, token_matrices, weight_blocks

_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_MMA_OPERANDS = gl.constexpr(MMA_OPERANDS)
_DEQUANT_OPERANDS = gl.constexpr(DEQUANT_OPERANDS)


@gluon.jit
def _multiply(a, b, meta, sums, V: gl.constexpr, selector: gl.constexpr):
    """Every warp's tiles of A times its tiles of B, added to `sums`."""
    return gl.inline_asm_elementwise(
        mma_text(V.kind, selector),
        _MMA_OPERANDS,
        [a, b, meta, sums],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _halves(codes, scales, V: gl.constexpr):
    """Words of codes [WK, BN/16, 1, 32, 1] to registers of A [.., 4], scaled or not."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    shape: gl.constexpr = [V.WK, V.BN // 16, 1, 32, 4]
    four = scales + gl.zeros(shape, gl.int32, layout)
    return gl.inline_asm_elementwise(
        dequant_text(V.kind, not V.scale_sums),
        _DEQUANT_OPERANDS,
        [codes, four],
        dtype=gl.int32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _block_offsets(last, stride, V: gl.constexpr, pieces: gl.constexpr):
    """Words of a step of packed weights: [block of rows, WK, piece, lane, 4].

    `last` is the highest block of rows there is: beyond it that one is read again, and not used.
    """
    shape: gl.constexpr = [V.BN // 64, V.WK, pieces, 32, 4]
    layout: gl.constexpr = contiguous(shape, V.WN * V.WK * V.WM)
    L3: gl.constexpr = gl.SliceLayout(4, layout)
    L2: gl.constexpr = gl.SliceLayout(3, L3)
    L1: gl.constexpr = gl.SliceLayout(2, L2)
    block = gl.minimum(gl.arange(0, V.BN // 64, gl.SliceLayout(1, L1)), last)
    k = gl.arange(0, V.WK, gl.SliceLayout(0, L1))
    piece = gl.arange(0, pieces, gl.SliceLayout(0, gl.SliceLayout(1, L2)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L3))))
    slot_layout: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    )
    slot = gl.arange(0, 4, slot_layout)
    offset = (block * stride)[:, None] + (k * (pieces * 128))[None, :]
    offset = offset[:, :, None] + (piece * 128)[None, None, :]
    offset = offset[:, :, :, None] + (lane * 4)[None, None, None, :]
    return offset[:, :, :, :, None] + slot[None, None, None, None, :]


@gluon.jit
def _scale_offsets(last, groups, V: gl.constexpr):
    """Words of the scales of a step's first 32 columns a warp: [WK, tile of rows, lane]."""
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, fragments(V.WN, V.WK, V.WM)))
    k = gl.arange(0, V.WK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    tile = gl.arange(0, V.BN // 16, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    row = gl.minimum(tile // 4, last) * (groups * 32) + tile % 4
    offset = row[None, :] + (k * 64 // V.group * 32)[:, None]
    return offset[:, :, None] + (lane // 4 * 4)[None, None, :]


@gluon.jit
def _scales_of_sums(words, V: gl.constexpr):
    """fp32 scales [WK, tile, 1, 32, 4] of sums, of which 2 and 3 are of row g + 8."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    slot_layout: gl.constexpr = gl.SliceLayout(
        0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    )
    shift = (gl.arange(0, 4, slot_layout) // 2 * 16)[None, None, None, None, :]
    half = (words >> shift) & 0xFFFF
    return half.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _tokens(shared, V: gl.constexpr):
    """A step's tokens as two operands B, of columns 0 to 31 and 32 to 63 of every warp."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    matrices = shared.load(token_matrices(V.BM, V.WN, V.WK, V.WM))
    split = matrices.reshape([V.BM // 8, 8, V.WK, 2, 4, 4])  # tile, g, WK, half, register, t
    first, second = gl.split(gl.permute(split, [2, 0, 1, 5, 4, 3]))
    shape: gl.constexpr = [V.WK, 1, V.BM // 8, 32, 4]
    return (
        gl.convert_layout(first.reshape(shape), layout, assert_trivial=True),
        gl.convert_layout(second.reshape(shape), layout, assert_trivial=True),
    )


@gluon.jit
def _metadata(shared, V: gl.constexpr):
    """A step's metadata, one word for each tile and lane."""
    words = shared.load(weight_blocks(V.BN // 64, 1, V.WN, V.WK, V.WM))
    words = gl.permute(words.reshape([V.BN // 64, V.WK, 32, 4]), [1, 0, 3, 2])
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    return gl.convert_layout(
        words.reshape([V.WK, V.BN // 16, 1, 32, 1]), layout, assert_trivial=True
    )


@gluon.jit
def _known_metadata(V: gl.constexpr):
    """The same of a dense weight: blocks keep the first and the second pair by turns."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    L2: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, layout)))
    k = gl.arange(0, V.WK, gl.SliceLayout(1, L2))
    words = gl.where(k % 2 == 0, 0x44444444, -0x11111112)
    return words[:, None][:, :, None][:, :, :, None][:, :, :, :, None]


@gluon.jit
def _add_floats(weights, b0, b1, meta, sums, V: gl.constexpr):
    """One step of weights that are floats."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    shape: gl.constexpr = [V.WK, V.BN // 16, 1, 32, 4]
    split = weights.reshape([V.BN // 64, V.WK, 2, 4, 32, 4])
    a0, a1 = gl.split(gl.permute(split, [1, 0, 3, 4, 5, 2]))
    a0 = gl.convert_layout(a0.reshape(shape), layout, assert_trivial=True)
    a1 = gl.convert_layout(a1.reshape(shape), layout, assert_trivial=True)
    sums = _multiply(a0, b0, meta, sums, V, 0)
    return _multiply(a1, b1, meta, sums, V, 1)


@gluon.jit
def _add_codes(words, scales, b0, b1, meta, sums, V: gl.constexpr):
    """One step of weights that are codes; `scales` points at the step's."""
    layout: gl.constexpr = fragments(V.WN, V.WK, V.WM)
    shape: gl.constexpr = [V.WK, V.BN // 16, 1, 32, 1]
    c0, c1 = gl.split(gl.permute(words, [1, 0, 4, 3, 2]))
    c0 = gl.convert_layout(c0.reshape(shape), layout, assert_trivial=True)
    c1 = gl.convert_layout(c1.reshape(shape), layout, assert_trivial=True)
    s0 = gl.load(scales)[:, :, None, :, None]
    s1 = s0
    if V.group == 32:
        s1 = gl.load(scales + 32)[:, :, None, :, None]
    a0 = _halves(c0, s0, V)
    a1 = _halves(c1, s1, V)
    if not V.scale_sums:
        sums = _multiply(a0, b0, meta, sums, V, 0)
        return _multiply(a1, b1, meta, sums, V, 1)
    sums_shape: gl.constexpr = [V.WK, V.BN // 16, V.BM // 8, 32, 4]
    zeros = gl.zeros(sums_shape, gl.float32, layout)
    part = _multiply(a0, b0, meta, zeros, V, 0)
    if V.group == 32:
        sums = sums + part * _scales_of_sums(s0, V)
        part = _multiply(a1, b1, meta, zeros, V, 1)
    else:
        part = _multiply(a1, b1, meta, part, V, 1)
    return sums + part * _scales_of_sums(s1, V)


@gluon.jit
def _whole_tile(sums, V: gl.constexpr):
    """The program's tile fp32 [BM, BN], the parts of the warps along K added in order."""
    shape: gl.constexpr = [V.WK, V.BN // 16, V.BM // 8, 8, 4, 2, 2]
    parts = gl.permute(sums.reshape(shape), [0, 2, 4, 6, 1, 5, 3]).reshape([V.WK, V.BM, V.BN])
    layout: gl.constexpr = contiguous([V.BM, V.BN], V.WN * V.WK * V.WM, V.summed)
    if V.WK == 1:
        return gl.convert_layout(parts.reshape([V.BM, V.BN]), layout)
    one: gl.constexpr = contiguous([1, V.BM, V.BN], V.WN * V.WK * V.WM, V.summed)
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])
    room = gl.allocate_shared_memory(gl.float32, [V.WK, V.BM, V.BN], swizzled)
    room.store(parts)
    whole = room.slice(0, 1, 0).load(one)
    parts_of_k: gl.constexpr = V.WK
    for k in gl.static_range(1, parts_of_k):
        whole += room.slice(k, 1, 0).load(one)
    return gl.convert_layout(whole.reshape([V.BM, V.BN]), layout)


@gluon.jit
def _let_through(tile, V: gl.constexpr):
    """silu(g) u fp32 [BM, BN/2] of a tile [BM, BN] in whose rows of W g and u take turns."""
    turns = gl.permute(tile.reshape([V.BM, V.BN // 16, 2, 8]), [0, 1, 3, 2])
    g, u = gl.split(turns)
    layout: gl.constexpr = contiguous([V.BM, V.width], V.WN * V.WK * V.WM, V.stored)
    value = (g / (1 + gl.exp(-g)) * u).reshape([V.BM, V.width])
    return gl.convert_layout(value, layout, assert_trivial=True)


@gluon.jit
def _finish(tile, bias, residual, y, M, N, V: gl.constexpr):
    """Bias, gate and residual, and the way to memory; parts of a sum go there as they are."""
    if V.bias:
        rows: gl.constexpr = contiguous([V.BM, V.BN], V.WN * V.WK * V.WM, V.summed)
        of_w = gl.program_id(0) * V.BN + gl.arange(0, V.BN, gl.SliceLayout(0, rows))
        tile += gl.load(bias + of_w, mask=of_w < N, other=0.0).to(gl.float32)[None, :]
    if V.gated:
        tile = _let_through(tile, V)
        N = N // 2
    layout: gl.constexpr = contiguous([V.BM, V.width], V.WN * V.WK * V.WM, V.stored)
    n0, m0 = gl.program_id(0) * V.width, gl.program_id(1) * V.BM
    n = n0 + gl.arange(0, V.width, gl.SliceLayout(0, layout))
    m = gl.arange(0, V.BM, gl.SliceLayout(1, layout))
    inside = (m0 + m < M)[:, None] & (n < N)[None, :]
    row = (gl.program_id(2).to(gl.int64) * M + m0) * N  # beyond 32 bits in long batches
    offset = m[:, None] * N + n[None, :]
    if V.residual:
        tile += gl.load(residual + row + offset, mask=inside, other=0.0).to(gl.float32)
    gl.store(y + row + offset, tile.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def _token_offsets(M, K, V: gl.constexpr):
    """Words of a step's tokens [BM, BK/2] from the program's first token on, and who is there."""
    layout: gl.constexpr = contiguous([V.BM, 32 * V.WK], V.WN * V.WK * V.WM)
    m = gl.arange(0, V.BM, gl.SliceLayout(1, layout))
    k = gl.arange(0, 32 * V.WK, gl.SliceLayout(0, layout))
    if V.dense:
        k = k // 64 * 32 + k % 32  # two blocks of the weight have the same columns
    there = gl.program_id(1) * V.BM + m < M
    offset = gl.where(there, m, 0)[:, None] * (K // 2) + k[None, :]
    return offset, there[:, None] & (k >= 0)[None, :], k


@gluon.jit
def _copy_tokens(shared, x, offsets, there, k, left, step, V: gl.constexpr):
    """Start copying a step's tokens; `left` words of a row are behind the program's first step."""
    if not V.whole_k:
        there = there & (k < left - step * V.step_words)[None, :]
    _copy(shared, x + step * V.step_words + offsets, there)


@gluon.jit
def _copy_weights(ws, es, w, e, step, V: gl.constexpr):
    """Start copying a step's weights and, where they are not known, their metadata."""
    pieces: gl.constexpr = 2 if V.group else 8
    _copy(ws, w + step * (V.WK * 128 * pieces))
    if not V.dense:
        _copy(es, e + step * (V.WK * 128))


# Without this, batches of 1 and of multiples of 16 would each be compiled for once more.
@gluon.jit(do_not_specialize=["M", "KB", "T"])
def sparse_gemm(x, w, e, s, bias, residual, y, M, N, K, KB, T, V: gl.constexpr):
    """y [M, N] = x [M, K] W^T (+ bias [N]) (+ residual [M, N]), or silu(g) u [M, N/2] of that.

    Grid: ceil(N / BN), ceil(M / BM), splits. x is read as pairs of halves; w, e and s are a
    FragmentWeight's values, meta and scales; KB its blocks of columns; T the steps of a split, the
    last of which may have fewer. With several splits y is fp32 [splits, M, N], one part for each.
    K counts columns of x; a dense weight has blocks for twice as many.
    """
    pieces: gl.constexpr = 2 if V.group else 8
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    S: gl.constexpr = V.stages
    xs = gl.allocate_shared_memory(gl.int32, [S, V.BM, 32 * V.WK], swizzled)
    ws = gl.allocate_shared_memory(gl.int32, [S, V.BN // 64, V.WK, pieces, 32, 4], plain)
    es = ws
    if not V.dense:
        es = gl.allocate_shared_memory(gl.int32, [S, V.BN // 64, V.WK, 1, 32, 4], plain)
    first = gl.program_id(2) * T
    steps = gl.minimum(KB // V.WK - first, T)
    block = gl.program_id(0) * (V.BN // 64)
    last = (N + 63) // 64 - 1 - block
    xo, there, k = _token_offsets(M, K, V)
    wo = _block_offsets(last, KB * (128 * pieces), V, pieces)
    eo = _block_offsets(last, KB * 128, V, 1)
    x += (gl.program_id(1) * V.BM).to(gl.int64) * (K // 2) + first * V.step_words
    w += (block.to(gl.int64) * KB + first * V.WK) * (128 * pieces)
    e += (block.to(gl.int64) * KB + first * V.WK) * 128
    left = K // 2 - first * V.step_words
    if V.group:
        groups = KB * 64 // V.group
        s += (block.to(gl.int64) * groups + first * V.WK * 64 // V.group) * 32
        so = _scale_offsets(last, groups, V)
    for stage in gl.static_range(S - 1):
        if stage < steps:
            _copy_tokens(xs.index(stage), x, xo, there, k, left, stage, V)
            _copy_weights(ws.index(stage), es.index(stage), w + wo, e + eo, stage, V)
        async_copy.commit_group()
    shape: gl.constexpr = [V.WK, V.BN // 16, V.BM // 8, 32, 4]
    sums = gl.zeros(shape, gl.float32, fragments(V.WN, V.WK, V.WM))
    for start in range(0, steps, S):
        for stage in gl.static_range(S):
            step = start + stage
            async_copy.wait_group(S - 2)
            if step + S - 1 < steps:
                to: gl.constexpr = (stage + S - 1) % S
                ahead = step + S - 1
                _copy_tokens(xs.index(to), x, xo, there, k, left, ahead, V)
                _copy_weights(ws.index(to), es.index(to), w + wo, e + eo, ahead, V)
            async_copy.commit_group()
            if step < steps:
                b0, b1 = _tokens(xs.index(stage), V)
                meta = _known_metadata(V) if V.dense else _metadata(es.index(stage), V)
                weights = ws.index(stage).load(weight_blocks(V.BN // 64, pieces, V.WN, V.WK, V.WM))
                if V.group:
                    scales = s + step * (V.WK * 64) // V.group * 32 + so
                    sums = _add_codes(weights, scales, b0, b1, meta, sums, V)
                else:
                    sums = _add_floats(weights, b0, b1, meta, sums, V)
    async_copy.wait_group(0)
    _finish(_whole_tile(sums, V), bias, residual, y, M, N, V)
