"""A whole decoder in C++: one call a step, instead of one a linear.

Knows weights, tokens and pages of keys and values; not where they come from.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from .library import BatchStruct, BlockStruct, CacheStruct, Library, ShapeStruct
from .packed import PackedWeight

PAGE_POSITIONS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with pre-norm RMSNorm, rotary attention and a gated SiLU MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float


@dataclass(frozen=True)
class Block:
    """One block: norms fp32 [hidden]; linears and biases (fp32 or None): q k v o gate up down."""

    attention_norm: Tensor
    mlp_norm: Tensor
    linears: Sequence[PackedWeight]
    biases: Sequence[Tensor | None]


@dataclass(frozen=True)
class Ends:
    """What is not in the blocks.

    `embedding` [vocab, hidden] is packed as int8 or dense floats, `head` as anything; a tied model
    gives one for both.
    `norm` is fp32 [hidden], `frequencies` fp32 [head_dim / 2] in radians per position.
    """

    embedding: PackedWeight
    head: PackedWeight
    norm: Tensor
    frequencies: Tensor


class NativeDecoder:
    """Runs tokens of any sequences in one call. One caller at a time."""

    def __init__(self, library: Library, shape: Shape, blocks: Sequence[Block], ends: Ends) -> None:
        """Bind the weights; they stay in memory as long as this does.

        Raises:
            HalfweaveError: they do not fit the shape.
        """
        self.shape = shape
        self._library, self.weights = library, (tuple(blocks), ends)
        structs = (BlockStruct * len(blocks))()
        for struct, block in zip(structs, blocks, strict=True):
            struct.attention_norm = block.attention_norm.data_ptr()
            struct.mlp_norm = block.mlp_norm.data_ptr()
            for i, (linear, bias) in enumerate(zip(block.linears, block.biases, strict=True)):
                struct.linears[i] = linear.struct
                struct.biases[i] = None if bias is None else bias.data_ptr()
        pointer = ctypes.c_void_p()
        library.call(
            "hw_decoder_new",
            byref(ShapeStruct(*(getattr(shape, name) for name, *_ in ShapeStruct._fields_))),
            structs,
            ends.norm.data_ptr(),
            byref(ends.embedding.struct),
            byref(ends.head.struct),
            ends.frequencies.data_ptr(),
            byref(pointer),
        )
        self._pointer = pointer.value
        weakref.finalize(self, library.functions.hw_decoder_free, self._pointer)
        self.page_bytes = int(library.functions.hw_page_bytes(self._pointer))

    def forward(
        self, ids: Tensor, positions: Tensor, pages: Tensor, starts: Tensor, memory: Tensor
    ) -> Tensor:
        """Final hidden states fp32 [tokens, hidden] of some tokens, and their keys and values.

        `ids` int32 and `positions` int64 are [tokens]; `pages` int32 lists the pages of every
        sequence, 16 positions each, and `starts` int64 [tokens] says where those of a token's own
        begin; `memory` uint8 holds the pages. A token sees the positions of its sequence up to its
        own, which were stored before or are in this call.

        Raises:
            HalfweaveError: an id, a position or a page is out of range.
        """
        hidden = torch.empty(len(ids), self.shape.hidden)
        batch = BatchStruct(
            len(ids),
            ids.data_ptr(),
            positions.data_ptr(),
            pages.data_ptr(),
            len(pages),
            starts.data_ptr(),
        )
        cache = CacheStruct(memory.data_ptr(), memory.nbytes, memory.nbytes // self.page_bytes)
        library = self._library
        library.call(
            "hw_forward",
            self._pointer,
            library.level_pointer,
            library.pool,
            byref(batch),
            byref(cache),
            hidden.data_ptr(),
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores fp32 [..., vocab] of hidden states [..., hidden]."""
        inputs = hidden.to(torch.float32).contiguous()
        scores = torch.empty(*hidden.shape[:-1], self.shape.vocab)
        library, tokens = self._library, inputs.numel() // self.shape.hidden
        if tokens:
            library.call(
                "hw_logits",
                self._pointer,
                library.level_pointer,
                library.pool,
                inputs.data_ptr(),
                tokens,
                scores.data_ptr(),
            )
        return scores
