"""One generic decoder in torch, driven by a spec. Knows no text, no requests.

The whole batch goes through each linear at once, and each sequence through attention by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.dispatch import LinearFunction, prepare
from ..kernels.formats import Dense
from ..kernels.paging import PAGE_POSITIONS
from .alibi import slopes
from .checkpoint import Checkpoint
from .loading import Loader, Norm
from .paged import PagedDecoder, Part, positions, slots, token_ids
from .rope import inverse_frequencies, rotate, rotation
from .spec import AlibiSpec, DecoderSpec, LearnedSpec, RopeSpec

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class _Block:
    """One decoder block, its linears bound to their kernels by role."""

    attention_norm: Norm
    mlp_norm: Norm
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: Mapping[str, LinearFunction]


@dataclass(frozen=True)
class _Place:
    """Where one part of the batch belongs.

    `rows` are its tokens in the batch, `slots` its sequence's in the memory; `mask` says which of
    these each token sees, or what it adds to their scores, and is None where one token sees all.
    """

    rows: slice
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Where:
    """What a block must know of the batch: all tokens' angles to turn by, and each part's place."""

    angles: tuple[Tensor, Tensor] | None
    places: Sequence[_Place]


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


class Decoder(PagedDecoder):
    """All blocks of a model, ready to run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        """Read and bind every weight; with `exact`, only to kernels that round nothing.

        Raises:
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        self.spec = spec
        self.dtype, self.device = dtype, device
        loader = Loader(checkpoint, spec, dtype, device)
        self._embedding, self._positions = loader.embedding(), loader.positions()
        named = spec.names.embedding_norm
        self._embedding_norm = loader.norm(named) if named else None
        self._blocks = [_block(loader, layer, exact) for layer in range(spec.layers)]
        self._norm = loader.norm(spec.names.norm)
        head = Dense(self._embedding) if spec.tied else loader.end(spec.names.head)
        self._head = prepare(head, None, device, dtype, exact)
        self._frequencies = self._slopes = None
        if isinstance(spec.positions, RopeSpec):
            self._frequencies = inverse_frequencies(spec.positions, spec.head_dim).to(device)
        if isinstance(spec.positions, AlibiSpec):
            self._slopes = slopes(spec.heads).to(device)

    @property
    def page_bytes(self) -> int:
        """What a page takes, over all layers."""
        spec = self.spec
        row = spec.kv_heads * spec.head_dim * self.dtype.itemsize
        return 2 * spec.layers * PAGE_POSITIONS * row

    def new_memory(self, pages: int) -> FloatMemory:
        """Room for so many pages."""
        shape = (self.spec.layers, self.spec.kv_heads, self.spec.head_dim)
        return FloatMemory(shape, pages, self.dtype, self.device)

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], memory: FloatMemory) -> Tensor:
        """Append all parts at once: their final hidden states [tokens of all, hidden], in order."""
        at = positions(parts).to(self.device)
        hidden = self._embedded(token_ids(parts).to(self.device), at)
        where = _Where(self._angles(at), self._places(parts))
        for index, block in enumerate(self._blocks):
            hidden = self._block(block, index, hidden, memory, where)
        return self._normed(hidden, self._norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab] on the CPU, where they are sampled."""
        return self._head(hidden).float().cpu()

    def _embedded(self, ids: Tensor, at: Tensor) -> Tensor:
        hidden = self._embedding[ids]
        if self._positions is not None and isinstance(self.spec.positions, LearnedSpec):
            hidden = hidden + self._positions[self.spec.positions.first + at]
        norm = self._embedding_norm
        return hidden if norm is None else self._normed(hidden, norm)

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        size, eps = x.shape[-1:], self.spec.norm.eps
        if norm.bias is not None:
            return functional.layer_norm(x, size, norm.gain, norm.bias, eps)
        normed: Tensor = functional.rms_norm(x, size, norm.gain, eps)
        return normed

    def _block(
        self, block: _Block, index: int, hidden: Tensor, memory: FloatMemory, where: _Where
    ) -> Tensor:
        attended = self._attention(
            block, index, self._normed(hidden, block.attention_norm), memory, where
        )
        hidden = hidden + attended
        return hidden + self._mlp(block, self._normed(hidden, block.mlp_norm))

    def _attention(
        self, block: _Block, index: int, x: Tensor, memory: FloatMemory, where: _Where
    ) -> Tensor:
        spec, linears = self.spec, block.linears
        q = self._placed(_split_heads(linears["q"](x), spec.heads), block.q_norm, where)
        k = self._placed(_split_heads(linears["k"](x), spec.kv_heads), block.k_norm, where)
        v = _split_heads(linears["v"](x), spec.kv_heads)
        attended = torch.empty_like(q)
        for place in where.places:
            rows, all_slots = place.rows, place.slots
            new = all_slots[len(all_slots) - (rows.stop - rows.start) :]
            memory.store(index, new, k[:, rows], v[:, rows])
            keys, values = memory.read(index, all_slots)
            attended[:, rows] = _attend(q[:, rows], keys, values, place.mask)
        return linears["o"](attended.transpose(0, 1).flatten(1))

    def _placed(self, x: Tensor, gain: Tensor | None, where: _Where) -> Tensor:
        """Queries or keys [heads, tokens, head_dim]: normed, then turned by their positions."""
        if gain is not None:
            x = self._normed(x, Norm(gain, None))
        return x if where.angles is None else rotate(x, *where.angles)

    def _mlp(self, block: _Block, x: Tensor) -> Tensor:
        linears, activation = block.linears, _ACTIVATIONS[self.spec.activation]
        up = linears["up"](x)
        inner = activation(linears["gate"](x)) * up if self.spec.gated else activation(up)
        return linears["down"](inner)

    def _angles(self, at: Tensor) -> tuple[Tensor, Tensor] | None:
        if self._frequencies is None:
            return None
        cosine, sine = rotation(self._frequencies, at)
        return cosine.to(self.dtype), sine.to(self.dtype)

    def _places(self, parts: Sequence[Part]) -> list[_Place]:
        places, first = [], 0
        for part in parts:
            rows = slice(first, first + len(part.tokens))
            mask = self._mask(part.start, len(part.tokens))
            places.append(_Place(rows, slots(part).to(self.device), mask))
            first = rows.stop
        return places

    def _mask(self, start: int, count: int) -> Tensor | None:
        """Which of start + count keys each of the new tokens sees, or what it adds to their scores.

        None when one token sees all and adds nothing.
        """
        total, window = start + count, self.spec.window
        if count == 1 and self._slopes is None and (window is None or total <= window):
            return None
        positions = torch.arange(total, device=self.device)
        distance = positions[start:, None] - positions
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self._slopes is None:
            return seen
        lost = self._slopes[:, None, None] * distance
        return (-lost).masked_fill(~seen, -torch.inf).to(self.dtype)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads * dim] to [heads, tokens, dim]."""
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(0, 1)
    return split


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention (Ainslie et al., 2305.13245) of q [heads, tokens, head_dim].

    `keys` and `values` are [kv_heads, start + tokens, head_dim]; consecutive heads share one.
    """
    if mask is None:
        # One token: the heads of a group stand in as the queries of their shared key-value head,
        # which is then read once and not once for each of them.
        grouped = q.reshape(1, len(keys), -1, q.shape[-1])
        mixed = functional.scaled_dot_product_attention(grouped, keys[None], values[None])
        return mixed.view_as(q)
    return functional.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
    )[0]


def _block(loader: Loader, layer: int, exact: bool) -> _Block:
    names = loader.spec.names
    return _Block(
        loader.block_norm(layer, names.attention_norm),
        loader.block_norm(layer, names.mlp_norm),
        loader.head_norm(layer, names.q_norm),
        loader.head_norm(layer, names.k_norm),
        {role: _bound(loader, layer, role, exact) for role in loader.spec.roles},
    )


def _bound(loader: Loader, layer: int, role: str, exact: bool) -> LinearFunction:
    weight, bias = loader.linear(layer, role), loader.bias(layer, role)
    return prepare(weight, bias, loader.device, loader.dtype, exact)


def _grown(old: Tensor, size: int) -> Tensor:
    new = old.new_empty(old.shape[0], size, *old.shape[2:])
    new[:, : old.shape[1]] = old
    return new
