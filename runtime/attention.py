"""Attention in torch: each sequence of a batch by itself, over keys and values in pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.dispatch import LinearFunction
from ..kernels.paging import PAGE_POSITIONS
from .alibi import slopes
from .loading import Loader
from .norms import Norm
from .paged import Part, slots
from .rope import inverse_frequencies, rotate, rotation
from .spec import AlibiSpec, DecoderSpec, Sight


class FloatMemory:
    """Keys and values as they are computed: [layers, pages * PAGE_POSITIONS, kv_heads, dim]."""

    def __init__(
        self, shape: tuple[int, int, int], pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, kv_heads, head_dim)."""
        layers, heads, dim = shape
        size = (layers, pages * PAGE_POSITIONS, heads, dim)
        self._keys, self._values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))

    @property
    def pages(self) -> int:
        """Pages that there is memory for."""
        return self._keys.shape[1] // PAGE_POSITIONS

    def grow(self, pages: int) -> None:
        """Make room for so many; what is there stays."""
        self._keys, self._values = (
            _grown(each, pages * PAGE_POSITIONS) for each in (self._keys, self._values)
        )

    def store(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [kv_heads, count, head_dim] into slots [count]."""
        self._keys[layer, at] = keys.transpose(0, 1)
        self._values[layer, at] = values.transpose(0, 1)

    def read(self, layer: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [kv_heads, count, head_dim] of slots [count]."""
        return self._keys[layer, at].transpose(0, 1), self._values[layer, at].transpose(0, 1)


@dataclass(frozen=True)
class Place:
    """Where one part of the batch belongs.

    `rows` are its tokens in the batch, `slots` its sequence's in the memory; `mask` says which of
    these each token sees, or what it adds to their scores, and is None where one token sees all.
    """

    rows: slice
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Where:
    """What a layer must know of the batch: all tokens' angles to turn by, and each part's place."""

    angles: tuple[Tensor, Tensor] | None
    places: Sequence[Place]


class Viewpoint:
    """Says where a batch is, for all layers of one sight."""

    def __init__(self, spec: DecoderSpec, sight: Sight, device: torch.device) -> None:
        self._window, self._device = sight.window, device
        self._frequencies = self._slopes = None
        if sight.rope is not None:
            self._frequencies = inverse_frequencies(sight.rope, spec.head_dim).to(device)
        if isinstance(spec.positions, AlibiSpec):
            self._slopes = slopes(spec.heads).to(device)

    def where(self, parts: Sequence[Part], at: Tensor, dtype: torch.dtype) -> Where:
        """For a batch of parts, whose tokens have the positions `at`."""
        angles = None
        if self._frequencies is not None:
            cosine, sine = rotation(self._frequencies, at)
            angles = cosine.to(dtype), sine.to(dtype)
        places, first = [], 0
        for part in parts:
            rows = slice(first, first + len(part.tokens))
            mask = self._mask(part.start, len(part.tokens), dtype)
            places.append(Place(rows, slots(part).to(self._device), mask))
            first = rows.stop
        return Where(angles, places)

    def _mask(self, start: int, count: int, dtype: torch.dtype) -> Tensor | None:
        """Which of start + count keys each of the new tokens sees, or what it adds to their scores.

        None when one token sees all and adds nothing.
        """
        total, window = start + count, self._window
        if count == 1 and self._slopes is None and (window is None or total <= window):
            return None
        positions = torch.arange(total, device=self._device)
        distance = positions[start:, None] - positions
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self._slopes is None:
            return seen
        lost = self._slopes[:, None, None] * distance
        return (-lost).masked_fill(~seen, -torch.inf).to(dtype)


@dataclass(frozen=True)
class Attention:
    """That of one layer, its linears bound to their kernels by role."""

    spec: DecoderSpec
    layer: int
    linears: Mapping[str, LinearFunction]
    q_norm: Norm | None
    k_norm: Norm | None

    @classmethod
    def load(cls, loader: Loader, layer: int, exact: bool) -> Attention:
        """Read it; raises as the loader."""
        spec, names = loader.spec, loader.spec.names
        return cls(
            spec,
            layer,
            {role: loader.bound(layer, role, exact) for role in ("q", "k", "v", "o")},
            loader.head_norm(layer, names.q_norm),
            loader.head_norm(layer, names.k_norm),
        )

    def __call__(self, x: Tensor, memory: FloatMemory, where: Where) -> Tensor:
        """What attention adds to states x [tokens, hidden]; the memory gets keys and values."""
        spec, linears = self.spec, self.linears
        q = _placed(_split_heads(linears["q"](x), spec.heads), self.q_norm, where)
        k = _placed(_split_heads(linears["k"](x), spec.kv_heads), self.k_norm, where)
        v = _split_heads(linears["v"](x), spec.kv_heads)
        attended = torch.empty_like(q)
        for place in where.places:
            rows, all_slots = place.rows, place.slots
            new = all_slots[len(all_slots) - (rows.stop - rows.start) :]
            memory.store(self.layer, new, k[:, rows], v[:, rows])
            keys, values = memory.read(self.layer, all_slots)
            attended[:, rows] = self._attend(q[:, rows], keys, values, place.mask)
        return linears["o"](attended.transpose(0, 1).flatten(1))

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Grouped-query attention (Ainslie et al., 2305.13245) of q [heads, tokens, head_dim].

        `keys` and `values` are [kv_heads, start + tokens, head_dim]; consecutive heads share one.
        """
        scale = self.spec.attention_scale
        if self.spec.attention_cap is not None:
            return _attend_capped(q, keys, values, mask, scale, self.spec.attention_cap)
        if mask is None:
            # One token: the heads of a group stand in as the queries of their shared key-value
            # head, which is then read once and not once for each of them.
            grouped = q.reshape(1, len(keys), -1, q.shape[-1])
            mixed = functional.scaled_dot_product_attention(
                grouped, keys[None], values[None], scale=scale
            )
            return mixed.view_as(q)
        return functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
        )[0]


def _attend_capped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None, cap: float
) -> Tensor:
    """The same with soft-capped scores, which torch's own attention does not know."""
    shared = q.unflatten(0, (len(keys), -1))
    scores = torch.einsum("kgqd,ktd->kgqt", shared, keys)
    scores = capped(scores * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("kgqt,ktd->kgqd", weights, values).flatten(0, 1)


def capped(scores: Tensor, cap: float) -> Tensor:
    """Scores softly kept within -cap and cap."""
    return torch.tanh(scores / cap) * cap


def _placed(x: Tensor, norm: Norm | None, where: Where) -> Tensor:
    """Queries or keys [heads, tokens, head_dim]: normed, then turned by their positions."""
    if norm is not None:
        x = norm(x)
    return x if where.angles is None else rotate(x, *where.angles)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads * dim] to [heads, tokens, dim]."""
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(0, 1)
    return split


def _grown(old: Tensor, size: int) -> Tensor:
    new = old.new_empty(old.shape[0], size, *old.shape[2:])
    new[:, : old.shape[1]] = old
    return new
