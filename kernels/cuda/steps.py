"""The kernels between a decoder's linears, launched: tensors in, tensors out.

Works on CUDA tensors, and on CPU ones where Triton interprets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..paging import PAGE_POSITIONS
from .elementwise import gate, rms_norm, rope_and_remember
from .launch import on_its_device
from .paged_attention import attend, join
from .reduce import add_parts

_ROWS = 16  # query heads of a pair of keys and values are filled up to these
_TOGETHER = 64  # positions that a program looks at together
_LONG_SPLIT = 256  # positions of a split where there are enough programs without
_MOST_SPLITS = 64  # which are put together in registers
_ENOUGH = 128  # programs
_WIDE = 256  # of heads
_GATED = 1024
_RESULTS = 1024  # of a program that adds parts


@dataclass(frozen=True)
class Pages:
    """Keys and values of one layer: [pages, PAGE_POSITIONS, kv_heads, dim], 16-bit or int8.

    Scales are fp32 [pages, PAGE_POSITIONS, kv_heads], of int8 only.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Pages:
        """Room for `pages` of them; `dtype` float16, bfloat16 or int8."""
        shape = (pages, PAGE_POSITIONS, kv_heads, dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        if dtype != torch.int8:
            return cls(keys, values)
        scales = [torch.zeros(shape[:3], device=device) for _ in range(2)]
        return cls(keys, values, *scales)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there is."""
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(each for each in every if each is not None)

    @property
    def coded(self) -> bool:
        """Whether they are int8."""
        return self.key_scales is not None

    def first(self, table: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `count` keys and values of the sequence of `table`: [count, kv_heads, dim]."""
        used = table[: -(-count // PAGE_POSITIONS)].long()
        return (
            _floats(self.keys, self.key_scales, used, dtype)[:count],
            _floats(self.values, self.value_scales, used, dtype)[:count],
        )

    def grown(self, pages: int) -> Pages:
        """The same with room for more."""
        _, _, kv_heads, dim = self.keys.shape
        more = Pages.empty(pages, kv_heads, dim, self.keys.dtype, self.keys.device)
        for name in ("keys", "values", "key_scales", "value_scales"):
            old, new = getattr(self, name), getattr(more, name)
            if old is not None:
                new[: len(old)] = old
        return more


def _floats(stored: Tensor, scales: Tensor | None, used: Tensor, dtype: torch.dtype) -> Tensor:
    found = stored[used].flatten(0, 1)
    if scales is None:
        return found.to(dtype)
    return (found.float() * scales[used].flatten(0, 1)[..., None]).to(dtype)


@on_its_device
def normed(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [tokens, size], to which `delta`, or its parts, is added first, in place."""
    y = torch.empty_like(x)
    size = x.shape[1]
    width = triton.next_power_of_2(size)
    given = x if delta is None else delta.contiguous()
    splits = 0 if delta is None else splits_of(delta)
    warps = min(16, max(1, width // 256))
    rms_norm[(len(x),)](x, given, gain, y, size, eps, B=width, splits=splits, num_warps=warps)
    return y


@on_its_device
def gated(both: Tensor, dtype: torch.dtype, run: int = 0) -> Tensor:
    """silu(g) u [tokens, size] of rows [g, u], or of parts of them: `both` [.., tokens, 2 size].

    Where `run` is not 0, g and u take turns, so many of each.
    """
    tokens, size = both.shape[-2], both.shape[-1] // 2
    y = both.new_empty(tokens, size, dtype=dtype)
    grid = tokens, triton.cdiv(size, _GATED)
    gate[grid](both.contiguous(), y, size, B=_GATED, splits=splits_of(both), run=run)
    return y


def splits_of(result: Tensor) -> int:
    """Parts that a linear's result [M, N] or [splits, M, N] is to be added up from."""
    return len(result) if result.dim() == 3 else 1


@on_its_device
def remember(
    qkv: Tensor, positions: Tensor, table: Tensor, frequencies: Tensor, pages: Pages, q: Tensor
) -> None:
    """Turned queries go into `q` [tokens, heads, dim]; turned keys, and values, into `pages`.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) dim], or parts of it.
        positions: int32 [tokens].
        table: int32 [tokens, most pages], the pages of each token's sequence.
        frequencies: fp32 [dim / 2].
    """
    tokens, heads, dim = q.shape
    kv_heads = pages.keys.shape[2]
    none = frequencies  # stands where nothing is read
    rope_and_remember[(tokens, heads + 2 * kv_heads)](
        qkv.contiguous(),
        positions,
        table,
        frequencies,
        q,
        pages.keys,
        pages.values,
        none if pages.key_scales is None else pages.key_scales,
        none if pages.value_scales is None else pages.value_scales,
        heads,
        kv_heads,
        dim // 2,
        table.shape[1],
        B=triton.next_power_of_2(dim // 2),
        page=PAGE_POSITIONS,
        coded=pages.coded,
        splits=splits_of(qkv),
        num_warps=1,
    )


@on_its_device
def attend_newest(q: Tensor, pages: Pages, table: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Attention of one token a sequence to all that its sequence remembers: as `q`.

    Args:
        q: [sequences, heads, dim].
        table: int32 [sequences, most pages].
        lengths: int32 [sequences], the new token included; `longest` is at least all of them.
    """
    sequences, heads, dim = q.shape
    kv_heads, width = pages.keys.shape[2], _width(dim)
    shared = heads // kv_heads
    each = _split_positions(sequences * kv_heads, longest)
    splits = triton.cdiv(longest, each)
    partial = q.new_empty(sequences, kv_heads, splits, _ROWS, width, dtype=torch.float32)
    sums = q.new_empty(sequences, kv_heads, splits, 2, _ROWS, dtype=torch.float32)
    y = torch.empty_like(q)
    factor = math.log2(math.e) / math.sqrt(dim)
    attend[(sequences, kv_heads, splits)](
        q,
        pages.keys,
        pages.values,
        sums if pages.key_scales is None else pages.key_scales,
        sums if pages.value_scales is None else pages.value_scales,
        table,
        lengths,
        partial,
        sums,
        factor,
        kv_heads,
        dim,
        table.shape[1],
        each,
        G=shared,
        D=width,
        B=_TOGETHER,
        page=PAGE_POSITIONS,
        coded=pages.coded,
        num_warps=_warps(width, pages.coded),
    )
    most, known = triton.next_power_of_2(splits), (kv_heads, dim, splits, each)
    sizes = {"G": shared, "D": width, "S": most}
    warps = _warps(width, True)
    join[(sequences, heads)](partial, sums, lengths, y, *known, **sizes, num_warps=warps)
    return y


def attention_bytes(sequences: int, kv_heads: int, dim: int, longest: int) -> int:
    """What `attend_newest` takes for its parts of so many sequences, or of any fewer, at most."""
    counts = (count * kv_heads for count in range(1, sequences + 1))
    most = max(count * triton.cdiv(longest, _split_positions(count, longest)) for count in counts)
    return int(4 * most * _ROWS * (_width(dim) + 2))


def _width(dim: int) -> int:
    return int(max(16, triton.next_power_of_2(dim)))


def _warps(width: int, in_fp32: bool) -> int:
    """Of attention's programs: wide heads in fp32 leave four no registers on some architectures."""
    return 8 if in_fp32 and width >= _WIDE else 4


def _split_positions(programs: int, longest: int) -> int:
    """Positions of a split: short ones where there would be few programs, but not too many."""
    least = _LONG_SPLIT if programs >= _ENOUGH else _TOGETHER
    together = triton.cdiv(triton.cdiv(longest, _MOST_SPLITS), _TOGETHER) * _TOGETHER
    return int(max(least, together))


@on_its_device
def add_up(parts: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write the sum of parts fp32 [splits, M, N], and of what there is beside them, to y [M, N]."""
    add_parts[(triton.cdiv(y.numel(), _RESULTS),)](
        parts,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        y.shape[1],
        y.numel(),
        splits=len(parts),
        B=_RESULTS,
        biased=bias is not None,
        added=residual is not None,
    )
