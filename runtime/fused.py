"""The decoder on a CPU: every step is one call into the kernels.

Keys and values are rounded to fp16. Where a checkpoint has linears of codes, their inputs are
rounded to 8 bits, and so are the embedding and the head (this one to 4, if asked); where all its
weights are floats, nothing else is. The tokens of a sequence get the same bits however it is cut
into calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CapacityError
from ..kernels.cpu.decoder import PAGE_POSITIONS, Block, Ends, NativeDecoder, Shape
from ..kernels.cpu.library import Library
from ..kernels.cpu.packed import CODED, PackedWeight, pack_weight, round_weight
from ..kernels.formats import Dense
from .checkpoint import Checkpoint
from .loading import EMBEDDING, HEAD, Loader
from .rope import inverse_frequencies
from .spec import DecoderSpec

_TOKENS_AT_ONCE = 256  # bounds the states that a long prompt has at a time
_FIRST_PAGES = 16


def rounds_end(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the embedding or head `name` is rounded when it is loaded.

    That is where some linear is stored as codes, and this one is not.
    """
    coded = {linear for linear, entry in checkpoint.linears.items() if entry.format in CODED}
    return bool(coded) and name not in coded


class FusedCache:
    """Keys and values of one sequence, in pages of its own; `length` positions are filled."""

    def __init__(self, page_bytes: int, limit: int) -> None:
        """`limit` is the most positions there may ever be."""
        self.length = 0
        self._limit, self._page_bytes = limit, page_bytes
        self.memory = torch.empty(0, dtype=torch.uint8)

    @property
    def pages(self) -> int:
        """Pages that there is memory for."""
        return self.memory.nbytes // self._page_bytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions.

        Raises:
            CapacityError: that would be more than the limit.
        """
        needed = self.length + count
        if needed > self._limit:
            raise CapacityError(f"{needed} positions, the model has {self._limit}")
        wanted, most = -(-needed // PAGE_POSITIONS), -(-self._limit // PAGE_POSITIONS)
        if wanted > self.pages:
            pages = min(max(wanted, 2 * self.pages, _FIRST_PAGES), most)
            grown = torch.empty(pages * self._page_bytes, dtype=torch.uint8)
            grown[: self.memory.nbytes] = self.memory
            self.memory = grown


class FusedDecoder:
    """As `Decoder`. One thread at a time, any number of sequences; `native` takes them at once."""

    def __init__(
        self, checkpoint: Checkpoint, spec: DecoderSpec, library: Library, head_bits: int = 8
    ) -> None:
        """Read and repack every weight; `head_bits`, 8 or 4, are those of a head that is rounded.

        Raises:
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        self.spec, self.level = spec, library.level
        loader = Loader(checkpoint, spec, torch.float32, torch.device("cpu"))
        self.native = NativeDecoder(
            library,
            Shape(
                spec.layers,
                spec.hidden,
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.ffn,
                spec.vocab,
                spec.norm_eps,
            ),
            [_block(loader, library, f"model.layers.{i}.") for i in range(spec.layers)],
            _ends(loader, library, head_bits),
        )

    def new_cache(self, limit: int | None = None) -> FusedCache:
        """An empty cache for one sequence of at most `limit` positions."""
        limit = self.spec.max_positions if limit is None else limit
        return FusedCache(self.native.page_bytes, limit)

    def forward(self, token_ids: Tensor, cache: FusedCache) -> Tensor:
        """Append tokens [T] to a sequence; returns their final hidden states [T, hidden].

        Raises:
            CapacityError: the sequence would be longer than its cache allows.
        """
        cache.reserve(len(token_ids))
        pages = torch.arange(cache.pages, dtype=torch.int32)
        parts = [self._append(part, cache, pages) for part in token_ids.split(_TOKENS_AT_ONCE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab], for final hidden states [..., hidden]."""
        return self.native.logits(hidden)

    def _append(self, ids: Tensor, cache: FusedCache, pages: Tensor) -> Tensor:
        count = len(ids)
        positions = torch.arange(cache.length, cache.length + count)
        starts = torch.zeros(count, dtype=torch.int64)
        ids = ids.to(torch.int32).contiguous()
        hidden = self.native.forward(ids, positions, pages, starts, cache.memory)
        cache.length += count
        return hidden


def _block(loader: Loader, library: Library, prefix: str) -> Block:
    names = [prefix + name for name in loader.spec.linear_shapes]
    linears = [pack_weight(library, loader.packed(name)) for name in names]
    biases = [loader.bias(name) for name in names]
    attention = loader.vector(f"{prefix}input_layernorm.weight", loader.spec.hidden)
    mlp = loader.vector(f"{prefix}post_attention_layernorm.weight", loader.spec.hidden)
    return Block(attention, mlp, linears, biases)


def _ends(loader: Loader, library: Library, head_bits: int) -> Ends:
    spec = loader.spec
    name = EMBEDDING if spec.tied else HEAD
    embedding = _end(loader, library, EMBEDDING, 8)
    shared = spec.tied and (head_bits == 8 or not rounds_end(loader.checkpoint, name))
    head = embedding if shared else _end(loader, library, name, head_bits)
    norm = loader.vector("model.norm.weight", spec.hidden)
    frequencies = inverse_frequencies(spec.rope, spec.head_dim).contiguous()
    return Ends(embedding, head, norm, frequencies)


def _end(loader: Loader, library: Library, name: str, bits: int) -> PackedWeight:
    """As it is stored, or in `bits` where it is rounded."""
    stored = loader.packed(name)
    if not rounds_end(loader.checkpoint, name):
        return pack_weight(library, stored)
    floats = stored.weight if isinstance(stored, Dense) else stored.unpack()
    return round_weight(library, floats, bits)
