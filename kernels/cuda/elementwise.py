"""What a decoder does between its linears: norms, turns, the cache, gates; plain Triton.

A linear whose K was parted leaves fp32 parts behind each other, and the next kernel adds them, in
one order: that saves a kernel, which takes longer to start than parts to add. `splits` says how
many there are, 1 where the linear gave its result.

Keys and values of all sequences stand in pages of PAGE_POSITIONS that any sequence may own:
[pages, PAGE_POSITIONS, kv_heads, dim], 16-bit, or int8 with scales fp32 [pages, PAGE_POSITIONS,
kv_heads].
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def _summed(parts, inside, apart, splits: tl.constexpr):
    """fp32 sums of what stands at pointers `parts` and so many elements apart behind them."""
    total = tl.load(parts, inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, splits):
        total += tl.load(parts + split * apart, inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def rms_norm(x, delta, gain, y, size, eps, B: tl.constexpr, splits: tl.constexpr):
    """y = x / rms(x) * gain (Zhang and Sennrich, 1910.07467), after x += delta.

    Rows of `size` <= B; one program a row. x is changed in place. delta [splits, M, size]; there
    is none where `splits` is 0.
    """
    at = tl.arange(0, B)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    value = tl.load(x + row + at, inside, other=0.0).to(tl.float32)
    if splits:
        apart = tl.num_programs(0).to(tl.int64) * size
        value += _summed(delta + row + at, inside, apart, splits)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + at, rounded, inside)
        value = rounded.to(tl.float32)  # what is written is what the next norm reads
    factor = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scaled = value * factor * tl.load(gain + at, inside, other=0.0).to(tl.float32)
    tl.store(y + row + at, scaled.to(y.dtype.element_ty), inside)


@triton.jit
def gate(up, y, size, B: tl.constexpr, splits: tl.constexpr, run: tl.constexpr):
    """y [M, size] = silu(g) u for rows of g, then u, `up` [splits, M, 2 size].

    Or they take turns, `run` of each, where that is not 0. Grid: M, ceil(size / B).
    """
    at = tl.program_id(1) * B + tl.arange(0, B)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    apart = tl.num_programs(0).to(tl.int64) * 2 * size
    first, further = (at + at // run * run, run) if run else (at, size)
    g = _summed(up + 2 * row + first, inside, apart, splits)
    u = _summed(up + 2 * row + first + further, inside, apart, splits)
    tl.store(y + row + at, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), inside)


@triton.jit
def _turned(first, second, angle):
    """Both halves of a head, turned by the token's angles (2104.09864)."""
    cosine, sine = tl.cos(angle), tl.sin(angle)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _stored(out, scales, at_head, first, second, half, at, inside, coded: tl.constexpr):
    """Write both halves of a vector; as codes, with what to multiply them by."""
    if coded:
        most = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        tl.store(scales + at_head, most / 127)
        factor = tl.where(most > 0, 127 / most, 0.0)
        first = tl.floor(first * factor + 0.5)
        second = tl.floor(second * factor + 0.5)
    start = at_head * 2 * half
    tl.store(out + start + at, first.to(out.dtype.element_ty), inside)
    tl.store(out + start + half + at, second.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["most_pages"])
def rope_and_remember(
    qkv,
    positions,
    tables,
    frequencies,
    q,
    keys,
    values,
    key_scales,
    value_scales,
    heads,
    kv_heads,
    half,
    most_pages,
    B: tl.constexpr,
    page: tl.constexpr,
    coded: tl.constexpr,
    splits: tl.constexpr,
):
    """Turn the queries and keys of each token, and put keys and values into its sequence's pages.

    Grid: tokens, heads + 2 kv_heads. qkv [splits, tokens, (heads + 2 kv_heads) 2 half] are one
    linear's rows; q [tokens, heads, 2 half] gets the queries. Token t is at positions[t] of the
    sequence whose pages are tables[t, :most_pages]. `half` <= B is half a head; frequencies fp32
    [half].
    """
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, B)
    inside = at < half
    position = tl.load(positions + token)
    every = heads + 2 * kv_heads
    start = qkv + (token.to(tl.int64) * every + head) * 2 * half + at
    apart = tl.num_programs(0).to(tl.int64) * every * 2 * half
    first = _summed(start, inside, apart, splits)
    second = _summed(start + half, inside, apart, splits)
    if head < heads + kv_heads:
        angle = position.to(tl.float32) * tl.load(frequencies + at, inside, other=0.0)
        first, second = _turned(first, second, angle)
    if head < heads:
        own = q + (token.to(tl.int64) * heads + head) * 2 * half
        tl.store(own + at, first.to(q.dtype.element_ty), inside)
        tl.store(own + half + at, second.to(q.dtype.element_ty), inside)
    else:
        number = tl.load(tables + token.to(tl.int64) * most_pages + position // page).to(tl.int64)
        slot = (number * page + position % page) * kv_heads
        if head < heads + kv_heads:
            at_head = slot + head - heads
            _stored(keys, key_scales, at_head, first, second, half, at, inside, coded)
        else:
            at_head = slot + head - heads - kv_heads
            _stored(values, value_scales, at_head, first, second, half, at, inside, coded)
