"""What a decoder does between its linears: norms, turns, the cache, gates; plain Triton.

Keys and values of all sequences stand in pages of PAGE_POSITIONS that any sequence may own:
[pages, PAGE_POSITIONS, kv_heads, dim], 16-bit, or int8 with scales fp32 [pages, PAGE_POSITIONS,
kv_heads].
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernels as values.
import triton
import triton.language as tl


@triton.jit
def rms_norm(x, delta, gain, y, size, eps, B: tl.constexpr, adds: tl.constexpr):
    """y = x / rms(x) * gain (Zhang and Sennrich, 1910.07467); with `adds`, x += delta before.

    Rows of `size` <= B; one program a row. x is changed in place.
    """
    at = tl.arange(0, B)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    value = tl.load(x + row + at, inside, other=0.0).to(tl.float32)
    if adds:
        value += tl.load(delta + row + at, inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row + at, rounded, inside)
        value = rounded.to(tl.float32)  # what is written is what the next norm reads
    factor = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scaled = value * factor * tl.load(gain + at, inside, other=0.0).to(tl.float32)
    tl.store(y + row + at, scaled.to(y.dtype.element_ty), inside)


@triton.jit
def gate(up, y, size, B: tl.constexpr):
    """y [M, size] = silu(g) u for rows `up` [M, 2 size] of g, then u; grid M, ceil(size / B)."""
    at = tl.program_id(1) * B + tl.arange(0, B)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    g = tl.load(up + 2 * row + at, inside, other=0.0).to(tl.float32)
    u = tl.load(up + 2 * row + size + at, inside, other=0.0).to(tl.float32)
    tl.store(y + row + at, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), inside)


@triton.jit
def _turned(x, start, cosine, sine, half, at, inside):
    """Dimensions `at` and `at` + half of a head, turned by the token's angles (2104.09864)."""
    first = tl.load(x + start + at, inside, other=0.0).to(tl.float32)
    second = tl.load(x + start + half + at, inside, other=0.0).to(tl.float32)
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
):
    """Turn the queries and keys of each token, and put keys and values into its sequence's pages.

    Grid: tokens, heads + 2 kv_heads. qkv [tokens, (heads + 2 kv_heads) 2 half] are one linear's
    rows; q [tokens, heads, 2 half] gets the queries. Token t is at positions[t] of the sequence
    whose pages are tables[t, :most_pages]. `half` <= B is half a head; frequencies fp32 [half].
    """
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, B)
    inside = at < half
    position = tl.load(positions + token)
    angle = position.to(tl.float32) * tl.load(frequencies + at, inside, other=0.0)
    start = (token.to(tl.int64) * (heads + 2 * kv_heads) + head) * 2 * half
    if head < heads + kv_heads:
        first, second = _turned(qkv, start, tl.cos(angle), tl.sin(angle), half, at, inside)
    else:
        first = tl.load(qkv + start + at, inside, other=0.0).to(tl.float32)
        second = tl.load(qkv + start + half + at, inside, other=0.0).to(tl.float32)
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
