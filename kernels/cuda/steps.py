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
from .paged_attention import attend, join

_ROWS = 16  # query heads of a pair of keys and values are filled up to these
_PAGES_OF_A_SPLIT = 16  # 256 positions: fewer do not pay for being put together again
_GATED = 1024


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


def normed(x: Tensor, delta: Tensor | None, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [tokens, size], to which `delta` is added first, in place."""
    y = torch.empty_like(x)
    size = x.shape[1]
    width = triton.next_power_of_2(size)
    given = x if delta is None else delta
    rms_norm[(len(x),)](x, given, gain, y, size, eps, B=width, adds=delta is not None)
    return y


def gated(both: Tensor) -> Tensor:
    """silu(g) u for rows [g, u]: [tokens, size] of [tokens, 2 size]."""
    size = both.shape[1] // 2
    y = both.new_empty(len(both), size)
    gate[(len(both), triton.cdiv(size, _GATED))](both, y, size, B=_GATED)
    return y


def remember(
    qkv: Tensor, positions: Tensor, table: Tensor, frequencies: Tensor, pages: Pages, heads: int
) -> Tensor:
    """Turned queries [tokens, heads, dim]; turned keys, and values, go into `pages`.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) dim].
        positions: int32 [tokens].
        table: int32 [tokens, most pages], the pages of each token's sequence.
        frequencies: fp32 [dim / 2].
    """
    kv_heads, dim = pages.keys.shape[2:]
    q = qkv.new_empty(len(qkv), heads, dim)
    none = frequencies  # stands where nothing is read
    rope_and_remember[(len(qkv), heads + 2 * kv_heads)](
        qkv,
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
    )
    return q


def attend_newest(q: Tensor, pages: Pages, table: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Attention of one token a sequence to all that its sequence remembers: as `q`.

    Args:
        q: [sequences, heads, dim].
        table: int32 [sequences, most pages].
        lengths: int32 [sequences], the new token included; `longest` is at least all of them.
    """
    sequences, heads, dim = q.shape
    kv_heads, width = pages.keys.shape[2], max(16, triton.next_power_of_2(dim))
    shared = heads // kv_heads
    splits = max(1, triton.cdiv(triton.cdiv(longest, PAGE_POSITIONS), _PAGES_OF_A_SPLIT))
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
        _PAGES_OF_A_SPLIT,
        G=shared,
        D=width,
        page=PAGE_POSITIONS,
        coded=pages.coded,
    )
    join[(sequences, kv_heads)](partial, sums, y, kv_heads, dim, splits, G=shared, D=width)
    return y
