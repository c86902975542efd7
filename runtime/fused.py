"""The decoder on a CPU: every step of any number of sequences is one call into the kernels.

Keys and values are rounded to fp16. Where a checkpoint has linears of codes, their inputs are
rounded to 8 bits, and so are the embedding and the head (this one to 4, if asked); where all its
weights are floats, nothing else is. The tokens of a sequence get the same bits however it is cut
into calls, and whatever else is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..kernels.cpu import decoder as native
from ..kernels.cpu.decoder import NativeDecoder
from ..kernels.cpu.library import Library
from ..kernels.cpu.packed import CODED, PackedWeight, pack_weight, round_weight
from ..kernels.cpu.room import Room
from ..kernels.dispatch import expanded, settled
from ..kernels.formats import Dense, PackedLinear
from ..kernels.measured import Product
from .alibi import slopes
from .checkpoint import Checkpoint
from .loading import Loader
from .norms import Norm
from .paged import PagedDecoder, Part, positions, token_ids
from .rope import inverse_frequencies
from .spec import ROLES, AlibiSpec, DecoderSpec, LearnedSpec, RopeSpec

_TOKENS_AT_ONCE = 256  # bounds the states that a long prompt has at a time


@dataclass(frozen=True)
class FusedBits:
    """How finely is rounded what may be: a head, 8 or 4 bits, and keys and values, 16 or 8."""

    head: int = 8
    kv: int = 16


def lacking(spec: DecoderSpec) -> list[str]:
    """What a model has that these kernels have not; it is run by `Decoder`, on the same ones."""
    names = spec.names
    return [
        what
        for what, missing in (
            ("experts", spec.experts is not None),
            ("layers that see less than others", spec.local is not None),
            ("norms behind attention and MLP", bool(names.attention_out_norm)),
            ("norms of sums", spec.residual == "post"),
            ("no norm before the head", not names.norm),
            ("an embedding of another size", spec.word_size is not None),
            ("scaled embeddings", spec.embedding_factor != 1),
            ("a scale of attention of its own", spec.attention_scale is not None),
            ("capped scores", spec.attention_cap is not None or spec.logit_cap is not None),
        )
        if missing
    ]


def rounds_end(checkpoint: Checkpoint, spec: DecoderSpec, name: str) -> bool:
    """Whether the embedding or head `name` is rounded when it is loaded.

    That is where some linear is stored as codes, and this one is not.
    """
    if lacking(spec):
        return False
    coded = {linear for linear, entry in checkpoint.linears.items() if entry.format in CODED}
    return bool(coded) and name not in coded


class FusedMemory:
    """Pages as the kernels lay them out, in bytes."""

    def __init__(self, page_bytes: int, pages: int) -> None:
        self._page_bytes = page_bytes
        self.bytes = torch.empty(pages * page_bytes, dtype=torch.uint8)

    @property
    def pages(self) -> int:
        """Pages that there is memory for."""
        return self.bytes.nbytes // self._page_bytes

    def grow(self, pages: int) -> None:
        """Make room for so many; what is there stays."""
        grown = torch.empty(pages * self._page_bytes, dtype=torch.uint8)
        grown[: self.bytes.nbytes] = self.bytes
        self.bytes = grown


@dataclass
class _Packer:
    """Puts weights into one room, in the order in which a token reads them."""

    library: Library
    room: Room
    expanded_bytes: int = 0  # that dense copies take beyond the packed ones they stand for

    def pack(self, weight: PackedLinear) -> PackedWeight:
        """As it is stored, or dense where that was measured to be faster (dispatch.py)."""
        if not settled(Product.of(weight)).expand:
            return pack_weight(self.library, weight, self.room)
        dense = pack_weight(self.library, expanded(weight), self.room)
        self.expanded_bytes += dense.struct.bytes - weight.nbytes
        return dense

    def round(self, weight: Tensor, bits: int) -> PackedWeight:
        return round_weight(self.library, weight, bits, self.room)


class FusedDecoder(PagedDecoder):
    """As `Decoder`, by the library's `NativeDecoder`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        library: Library,
        bits: FusedBits = FusedBits(),
    ) -> None:
        """Read and repack every weight.

        Raises:
            UnsupportedModel: the model has parts that these kernels lack.
            CheckpointError: a tensor is missing, illegal, or does not fit the config.
        """
        if lacks := lacking(spec):
            raise UnsupportedModel(f"the fused decoder lacks {', '.join(lacks)}")
        self.spec, self.level, self.device = spec, library.level, torch.device("cpu")
        loader = Loader(checkpoint, spec, torch.float32, torch.device("cpu"))
        packer = _Packer(library, Room())
        self.native = NativeDecoder(
            library,
            _shape(spec, bits),
            [_block(loader, packer, layer) for layer in range(spec.layers)],
            _ends(loader, packer, bits),
        )
        self.expanded_bytes = packer.expanded_bytes

    @property
    def page_bytes(self) -> int:
        """What a page takes, over all layers."""
        return self.native.page_bytes

    def new_memory(self, pages: int) -> FusedMemory:
        """Room for so many pages."""
        return FusedMemory(self.page_bytes, pages)

    def run(self, parts: Sequence[Part], memory: FusedMemory) -> Tensor:
        """Append all parts at once: their final hidden states [tokens of all, hidden], in order."""
        counts = [len(part.tokens) for part in parts]
        ends = np.cumsum([len(part.pages) for part in parts])
        starts = np.repeat(np.concatenate(([0], ends[:-1])), counts)
        pages = torch.from_numpy(np.fromiter(chain(*(part.pages for part in parts)), np.int32))
        batch = zip(
            token_ids(parts).split(_TOKENS_AT_ONCE),
            positions(parts).split(_TOKENS_AT_ONCE),
            torch.from_numpy(starts).split(_TOKENS_AT_ONCE),
            strict=True,
        )
        hidden = [self.native.forward(i, p, pages, s, memory.bytes) for i, p, s in batch]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every next token, fp32 [..., vocab], for final hidden states [..., hidden]."""
        return self.native.logits(hidden)


def _shape(spec: DecoderSpec, bits: FusedBits) -> native.Shape:
    return native.Shape(
        layers=spec.layers,
        hidden=spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffn=spec.ffn,
        vocab=spec.vocab,
        rotary_dim=spec.rotary_dim,
        window=spec.window or 0,
        cache_bits=bits.kv,
        norm_eps=spec.norm.eps,
        activation=spec.activation,
        parallel=spec.residual == "parallel",
    )


def _block(loader: Loader, packer: _Packer, layer: int) -> native.Block:
    spec = loader.spec
    return native.Block(
        _norm(loader.block_norm(layer, spec.names.attention_norm)),
        _norm(loader.block_norm(layer, spec.names.mlp_norm)),
        [packer.pack(loader.linear(layer, role)) if role in spec.roles else None for role in ROLES],
        [loader.bias(layer, role) if role in spec.roles else None for role in ROLES],
        _gain(loader.head_norm(layer, spec.names.q_norm)),
        _gain(loader.head_norm(layer, spec.names.k_norm)),
    )


def _gain(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.gain


def _norm(norm: Norm) -> native.Norm:
    return native.Norm(norm.gain, norm.bias)


def _ends(loader: Loader, packer: _Packer, bits: FusedBits) -> native.Ends:
    spec, positions = loader.spec, loader.spec.positions
    names, named, table = spec.names, spec.head_name, loader.positions()
    embedding = _end(loader, packer, names.embedding, 8)
    shared = spec.tied and (bits.head == 8 or not rounds_end(loader.checkpoint, spec, named))
    return native.Ends(
        embedding,
        head=embedding if shared else _end(loader, packer, named, bits.head),
        norm=_norm(loader.norm(names.norm)),
        embedding_norm=_norm(loader.norm(names.embedding_norm)) if names.embedding_norm else None,
        positions=None if table is None else packer.pack(Dense(table)),
        first_position=positions.first if isinstance(positions, LearnedSpec) else 0,
        frequencies=_frequencies(spec),
        slopes=slopes(spec.heads) if isinstance(positions, AlibiSpec) else None,
    )


def _frequencies(spec: DecoderSpec) -> Tensor | None:
    if not isinstance(spec.positions, RopeSpec):
        return None
    return inverse_frequencies(spec.positions, spec.head_dim).contiguous()


def _end(loader: Loader, packer: _Packer, name: str, bits: int) -> PackedWeight:
    """As it is stored, or in `bits` where it is rounded."""
    stored = loader.end(name)
    if not rounds_end(loader.checkpoint, loader.spec, name):
        return packer.pack(stored)
    floats = stored.weight if isinstance(stored, Dense) else stored.unpack()
    return packer.round(floats, bits)
