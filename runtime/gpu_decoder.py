"""The decoder on a GPU: packed linears, keys and values in pages, a few kernels a block.

q, k and v are one product, and so are gate and up, where their weights are stored alike. One new
token looks at the pages themselves; several at copies of them, by torch's attention. Under Triton's
interpreter the same code runs on CPU tensors. Nothing is captured in a graph yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from ..kernels.cuda.elementwise import PAGE
from ..kernels.cuda.steps import Pages, attend_newest, gated, normed, remember
from ..kernels.dispatch import LinearFunction, on_gpu
from ..kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from .cache import length_with
from .checkpoint import Checkpoint
from .loading import Loader
from .rope import inverse_frequencies
from .spec import DecoderSpec, RopeSpec

_TOKENS_AT_ONCE = 512
_FIRST_PAGES = 16
_MOST_SHARING = 16  # query heads to a pair of keys and values


@dataclass(frozen=True)
class _Block:
    attention_gain: Tensor
    mlp_gain: Tensor
    qkv: LinearFunction
    o: LinearFunction
    up: LinearFunction  # gate and up
    down: LinearFunction


class GpuCache:
    """Keys and values of one sequence, in pages of its own; `length` positions are filled."""

    def __init__(self, layers: Sequence[Pages], limit: int) -> None:
        """`layers` have a few pages each; `limit` is the most positions there may ever be."""
        self.layers, self.length, self._limit = list(layers), 0, limit
        self.table = self._numbers()

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions.

        Raises:
            CapacityError: that would be more than the limit.
        """
        needed = length_with(self.length, count, self._limit)
        there, wanted = len(self.layers[0].keys), -(-needed // PAGE)
        if wanted > there:
            most = -(-self._limit // PAGE)
            self.layers = [pages.grown(min(max(wanted, 2 * there), most)) for pages in self.layers]
            self.table = self._numbers()

    def _numbers(self) -> Tensor:
        keys = self.layers[0].keys
        return torch.arange(len(keys), dtype=torch.int32, device=keys.device)


class GpuDecoder:
    """As `Decoder`. One thread at a time, any number of sequences."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        kv_bits: int = 16,
    ) -> None:
        """Read and repack every weight; `dtype` float16 or bfloat16.

        Raises:
            UnsupportedModel: the model has parts that these kernels lack.
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        _check(spec)
        self.spec, self._dtype, self._device = spec, dtype, device
        self._stored = dtype if kv_bits == 16 else torch.int8
        loader = Loader(checkpoint, spec, dtype, device)
        self._embedding = loader.embedding()
        self._blocks = [_block(loader, layer) for layer in range(spec.layers)]
        self._gain = loader.norm(spec.names.norm).gain
        head = Dense(self._embedding) if spec.tied else loader.end(spec.names.head)
        self._head = _bound(head, None, loader)
        assert isinstance(spec.positions, RopeSpec)
        self._frequencies = inverse_frequencies(spec.positions, spec.head_dim).to(device)

    def new_cache(self, limit: int | None = None) -> GpuCache:
        """An empty cache for one sequence of at most `limit` positions."""
        spec, limit = self.spec, self.spec.max_positions if limit is None else limit
        pages = min(_FIRST_PAGES, -(-limit // PAGE))
        shape = (pages, spec.kv_heads, spec.head_dim, self._stored, self._device)
        return GpuCache([Pages.empty(*shape) for _ in range(spec.layers)], limit)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, cache: GpuCache) -> Tensor:
        """Append tokens [T] to a sequence; returns their final hidden states [T, hidden].

        Raises:
            CapacityError: the sequence would be longer than its cache allows.
        """
        cache.reserve(len(token_ids))
        parts = [self._append(part, cache) for part in token_ids.split(_TOKENS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab], on the CPU, where they are sampled."""
        return self._head(hidden).float().cpu()

    def _append(self, ids: Tensor, cache: GpuCache) -> Tensor:
        count, eps = len(ids), self.spec.norm.eps
        end = cache.length + count
        positions = torch.arange(cache.length, end, dtype=torch.int32, device=self._device)
        table = cache.table.expand(count, -1).contiguous()
        x, delta = self._embedding[ids.to(self._device)], None
        for block, pages in zip(self._blocks, cache.layers, strict=True):
            qkv = block.qkv(normed(x, delta, block.attention_gain, eps))
            q = remember(qkv, positions, table, self._frequencies, pages, self.spec.heads)
            delta = block.o(self._attended(q, pages, cache, end))
            both = block.up(normed(x, delta, block.mlp_gain, eps))
            delta = block.down(gated(both))
        cache.length = end
        return normed(x, delta, self._gain, eps)

    def _attended(self, q: Tensor, pages: Pages, cache: GpuCache, end: int) -> Tensor:
        """[tokens, heads dim] for queries [tokens, heads, dim], the last of which is `end` - 1."""
        count = len(q)
        if count == 1:
            lengths = torch.full((1,), end, dtype=torch.int32, device=self._device)
            return attend_newest(q, pages, cache.table[None], lengths, end).flatten(1)
        keys, values = pages.first(cache.table, end, self._dtype)
        at = torch.arange(end, device=self._device)
        seen = at <= at[end - count :, None]
        q, keys, values = (each.transpose(0, 1)[None] for each in (q, keys, values))
        mixed = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, enable_gqa=True
        )
        return mixed[0].transpose(0, 1).flatten(1)


def _check(spec: DecoderSpec) -> None:
    lacking = [
        what
        for what, missing in (
            ("positions that are not rotary", not isinstance(spec.positions, RopeSpec)),
            ("norms other than RMSNorm", spec.norm.kind != "rms"),
            ("MLPs other than gated SiLU ones", not spec.gated or spec.activation != "silu"),
            ("a sliding window", spec.window is not None),
            ("norms of heads", bool(spec.names.q_norm)),
            ("a norm of the embedding", bool(spec.names.embedding_norm)),
            ("over 16 query heads to a key", spec.heads > _MOST_SHARING * spec.kv_heads),
        )
        if missing
    ]
    if lacking:
        raise UnsupportedModel(f"the GPU kernels lack {', '.join(lacking)}")


def _block(loader: Loader, layer: int) -> _Block:
    names = loader.spec.names
    return _Block(
        loader.block_norm(layer, names.attention_norm).gain,
        loader.block_norm(layer, names.mlp_norm).gain,
        _together(loader, layer, ("q", "k", "v")),
        _together(loader, layer, ("o",)),
        _together(loader, layer, ("gate", "up")),
        _together(loader, layer, ("down",)),
    )


def _together(loader: Loader, layer: int, roles: Sequence[str]) -> LinearFunction:
    """One linear whose rows are those of several, one behind the other."""
    weights = [loader.linear(layer, role) for role in roles]
    biases = [loader.bias(layer, role) for role in roles]
    rows = [weight.shape[0] for weight in weights]
    bias = None
    if any(each is not None for each in biases):
        known = zip(biases, rows, strict=True)
        bias = torch.cat(
            [torch.zeros(count, device=loader.device) if b is None else b for b, count in known]
        )
    if _alike(weights):
        return _bound(_stacked(weights), bias, loader)
    starts = [sum(rows[:index]) for index in range(len(rows))]
    parts = [
        _bound(weight, None if bias is None else bias[start : start + count], loader)
        for weight, start, count in zip(weights, starts, rows, strict=True)
    ]
    return lambda x: torch.cat([part(x) for part in parts], -1)


def _alike(weights: Sequence[PackedLinear]) -> bool:
    return len({(type(each), getattr(each, "group", None)) for each in weights}) == 1


def _stacked(weights: Sequence[PackedLinear]) -> PackedLinear:
    """Weights of one format as one, row after row."""
    first = weights[0]
    tensors = {
        suffix: torch.cat([each.tensors()[suffix] for each in weights])
        for suffix in first.tensors()
    }
    if isinstance(first, Dense):
        return Dense(tensors["weight"])
    assert isinstance(first, Sparse24 | Sparse24Int4 | Int4 | Int8)
    return replace(first, **tensors)  # type: ignore[arg-type]


def _bound(weight: PackedLinear, bias: Tensor | None, loader: Loader) -> LinearFunction:
    return on_gpu(weight, bias, loader.device, loader.dtype)
