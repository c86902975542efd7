"""One generic decoder, driven by a spec: token ids in, logits out. Knows no text, no requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.dispatch import LinearFunction, prepare
from ..kernels.formats import Dense
from .cache import SequenceCache
from .checkpoint import Checkpoint
from .loading import Loader
from .rope import inverse_frequencies, rotate, rotation
from .spec import DecoderSpec


@dataclass(frozen=True)
class _Block:
    """One decoder block, its linears bound to their kernels."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q: LinearFunction
    k: LinearFunction
    v: LinearFunction
    o: LinearFunction
    gate: LinearFunction
    up: LinearFunction
    down: LinearFunction


class Decoder:
    """All blocks of a model, ready to run. One thread at a time, any number of sequences."""

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
        self._dtype, self._device = dtype, device
        loader = Loader(checkpoint, spec, dtype, device)
        embedding = loader.embedding()
        self._embedding = embedding
        self._blocks = [_block(loader, f"model.layers.{i}.", exact) for i in range(spec.layers)]
        self._norm = loader.vector("model.norm.weight", spec.hidden)
        self._head = _head(loader, embedding, exact)
        self._frequencies = inverse_frequencies(spec.rope, spec.head_dim).to(device)

    def new_cache(self, limit: int | None = None) -> SequenceCache:
        """An empty cache for one sequence of at most `limit` positions."""
        shape = (self.spec.layers, self.spec.kv_heads, self.spec.head_dim)
        limit = self.spec.max_positions if limit is None else limit
        return SequenceCache(shape, limit, self._dtype, self._device)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, cache: SequenceCache) -> Tensor:
        """Append tokens [T] to a sequence; returns their final hidden states [T, hidden].

        Raises:
            CapacityError: the sequence would be longer than its cache allows.
        """
        count = len(token_ids)
        cache.reserve(count)
        hidden = self._embedding[token_ids.to(self._device)]
        cosine, sine = rotation(self._frequencies, cache.length, count)
        cosine, sine = cosine.to(self._dtype), sine.to(self._dtype)
        mask = self._mask(cache.length, count)
        for index, block in enumerate(self._blocks):
            hidden = self._block(block, index, hidden, cache, (cosine, sine, mask))
        cache.advance(count)
        return self._normed(hidden, self._norm)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        normed: Tensor = functional.rms_norm(hidden, hidden.shape[-1:], weight, self.spec.norm_eps)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab], for final hidden states [..., hidden]."""
        return self._head(hidden).float()

    def _block(
        self,
        block: _Block,
        index: int,
        hidden: Tensor,
        cache: SequenceCache,
        position: tuple[Tensor, Tensor, Tensor | None],
    ) -> Tensor:
        spec = self.spec
        cosine, sine, mask = position
        x = self._normed(hidden, block.attention_norm)
        q = rotate(_split_heads(block.q(x), spec.heads), cosine, sine)
        k = rotate(_split_heads(block.k(x), spec.kv_heads), cosine, sine)
        keys, values = cache.store(index, k, _split_heads(block.v(x), spec.kv_heads))
        attended = _attend(q, keys, values, mask)
        hidden = hidden + block.o(attended.transpose(0, 1).flatten(1))
        x = self._normed(hidden, block.mlp_norm)
        return hidden + block.down(functional.silu(block.gate(x)) * block.up(x))

    def _mask(self, start: int, count: int) -> Tensor | None:
        """Which of start + count keys each of the new tokens sees; None when one sees them all."""
        if count == 1:
            return None
        everything = torch.ones(count, start + count, dtype=torch.bool, device=self._device)
        return everything.tril(diagonal=start)


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


def _bound(loader: Loader, linear: str, exact: bool) -> LinearFunction:
    weight, bias = loader.packed(linear), loader.bias(linear)
    return prepare(weight, bias, loader.device, loader.dtype, exact)


def _block(loader: Loader, prefix: str, exact: bool) -> _Block:
    hidden = loader.spec.hidden
    return _Block(
        loader.vector(f"{prefix}input_layernorm.weight", hidden),
        loader.vector(f"{prefix}post_attention_layernorm.weight", hidden),
        *(_bound(loader, prefix + name, exact) for name in loader.spec.linear_shapes),
    )


def _head(loader: Loader, embedding: Tensor, exact: bool) -> LinearFunction:
    if loader.spec.tied:
        return prepare(Dense(embedding), None, loader.device, loader.dtype, exact)
    return _bound(loader, "lm_head", exact)
