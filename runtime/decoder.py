"""One generic decoder, driven by a spec: token ids in, logits out. Knows no text, no requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError
from ..kernels.dispatch import LinearFunction, prepare
from ..kernels.formats import FLOAT_DTYPES, Dense
from .cache import SequenceCache
from .checkpoint import Checkpoint
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
        self, checkpoint: Checkpoint, spec: DecoderSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Read and bind every weight.

        Raises:
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        self.spec = spec
        self._dtype, self._device = dtype, device
        loader = _Loader(checkpoint, spec, dtype, device)
        embedding = loader.matrix("model.embed_tokens.weight", (spec.vocab, spec.hidden))
        self._embedding = embedding
        self._blocks = [loader.block(f"model.layers.{i}.") for i in range(spec.layers)]
        self._norm = loader.vector("model.norm.weight", spec.hidden)
        self._head = loader.head(embedding)
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


@dataclass(frozen=True)
class _Loader:
    """Reads weights under their names, against the shapes that the spec expects."""

    checkpoint: Checkpoint
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = self.checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {name}: config.json says {list(shape)}, found {list(found)}"
            )
        tensor = self.checkpoint.tensor(name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"tensor {name}: expected a float dtype, found {tensor.dtype}")
        return tensor.to(device=self.device, dtype=self.dtype)

    def vector(self, name: str, size: int) -> Tensor:
        return self.matrix(name, (size,))

    def linear(self, prefix: str, shape: tuple[int, int], bias: bool) -> LinearFunction:
        found = self.checkpoint.linear_shape(prefix)
        if found != shape:
            raise CheckpointError(
                f"linear {prefix}: config.json says {list(shape)}, found {list(found)}"
            )
        offset = self.vector(f"{prefix}.bias", shape[0]) if bias else None
        return prepare(self.checkpoint.linear(prefix), offset, self.device, self.dtype)

    def block(self, prefix: str) -> _Block:
        bound = {
            name: self.linear(
                prefix + name,
                shape,
                self.spec.attention_bias if name.startswith("self_attn") else self.spec.mlp_bias,
            )
            for name, shape in self.spec.linear_shapes.items()
        }
        hidden = self.spec.hidden
        return _Block(
            self.vector(f"{prefix}input_layernorm.weight", hidden),
            self.vector(f"{prefix}post_attention_layernorm.weight", hidden),
            *bound.values(),
        )

    def head(self, embedding: Tensor) -> LinearFunction:
        if self.spec.tied:
            return prepare(Dense(embedding), None, self.device, self.dtype)
        return self.linear("lm_head", (self.spec.vocab, self.spec.hidden), bias=False)
