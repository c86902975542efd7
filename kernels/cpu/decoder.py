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

from ...errors import HalfweaveError
from .library import (
    BatchStruct,
    BlockStruct,
    CacheStruct,
    EndsStruct,
    Library,
    NormStruct,
    ShapeStruct,
    WeightStruct,
    address,
)
from .packed import PackedWeight

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # numbers of api.h


@dataclass(frozen=True)
class Shape:
    """Sizes of a pre-norm decoder.

    Rotary positions turn the first `rotary_dim` dimensions of a head. A token sees `window`
    positions, its own included; 0 stands for all. Keys and values are stored in `cache_bits`: 16,
    or 8 with a scale for every vector of a head. `activation` is one of ACTIVATIONS. With
    `parallel` an MLP reads the states that its block's attention reads, without what that adds.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rotary_dim: int
    window: int
    cache_bits: int
    norm_eps: float
    activation: str
    parallel: bool = False


@dataclass(frozen=True)
class Norm:
    """RMSNorm without a bias, LayerNorm with one; both fp32 [size]."""

    gain: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """One block: norms of [hidden], and of every head's queries and keys, where there are some.

    Linears, and biases (fp32 or None), are q k v o gate up down; a plain MLP has None for a gate.
    """

    attention_norm: Norm
    mlp_norm: Norm
    linears: Sequence[PackedWeight | None]
    biases: Sequence[Tensor | None]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Ends:
    """What is not in the blocks.

    `embedding` [vocab, hidden] is packed as int8 or dense floats, `head` as anything; a tied model
    gives one for both. Of `positions`, packed as dense floats, the row `first_position` + p is
    added to the embedding at position p. `frequencies` fp32 [rotary_dim / 2] are radians per
    position; `slopes` fp32 [heads] are what a score loses per position of distance.
    """

    embedding: PackedWeight
    head: PackedWeight
    norm: Norm
    embedding_norm: Norm | None = None
    positions: PackedWeight | None = None
    first_position: int = 0
    frequencies: Tensor | None = None
    slopes: Tensor | None = None


class NativeDecoder:
    """Runs tokens of any sequences in one call. One caller at a time."""

    def __init__(self, library: Library, shape: Shape, blocks: Sequence[Block], ends: Ends) -> None:
        """Bind the weights; they stay in memory as long as this does.

        Raises:
            HalfweaveError: they do not fit the shape.
        """
        self.shape = shape
        self._library, self.weights = library, (tuple(blocks), ends)
        if len(blocks) != shape.layers:
            raise HalfweaveError(f"{len(blocks)} blocks are not {shape.layers} layers")
        structs = (BlockStruct * len(blocks))()
        for struct, block in zip(structs, blocks, strict=True):
            _fill(struct, block, shape)
        pointer = ctypes.c_void_p()
        shapes, ends_struct = byref(_shape_struct(shape)), byref(_ends_struct(ends, shape))
        library.call("hw_decoder_new", shapes, structs, ends_struct, byref(pointer))
        self._pointer = pointer.value
        # Not when the interpreter ends: a thread that ends with it may be in a call.
        weakref.finalize(self, library.functions.hw_decoder_free, self._pointer).atexit = False
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
            HalfweaveError: an id, a position or a page is out of range, or a tensor is another.
        """
        tokens, page_count, nbytes = ids.numel(), pages.numel(), memory.nbytes
        hidden = torch.empty(tokens, self.shape.hidden)
        batch = BatchStruct(
            tokens,
            address(ids, "ids", torch.int32, tokens),
            address(positions, "positions", torch.int64, tokens),
            address(pages, "pages", torch.int32, page_count),
            page_count,
            address(starts, "starts", torch.int64, tokens),
        )
        data = address(memory, "memory", torch.uint8, nbytes)
        cache = CacheStruct(data, nbytes, nbytes // self.page_bytes)
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
        """Scores fp32 [..., vocab] of hidden states [..., hidden].

        Raises:
            HalfweaveError: they have another last size, or are not in this machine's memory.
        """
        inputs = hidden.to(torch.float32).contiguous()
        *before, columns = hidden.shape or (0,)
        if columns != self.shape.hidden:
            raise HalfweaveError(f"hidden states of {columns} are not {self.shape.hidden}")
        address(inputs, "hidden", torch.float32, *hidden.shape)
        scores = torch.empty(*before, self.shape.vocab)
        library, tokens = self._library, inputs.numel() // columns
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


def _shape_struct(shape: Shape) -> ShapeStruct:
    values = {**vars(shape), "activation": ACTIVATIONS.index(shape.activation)}
    return ShapeStruct(*(values[name] for name, *_ in ShapeStruct._fields_))


def _fill(struct: BlockStruct, block: Block, shape: Shape) -> None:
    struct.attention_norm = _norm_struct(block.attention_norm, shape.hidden)
    struct.mlp_norm = _norm_struct(block.mlp_norm, shape.hidden)
    struct.q_norm = _vector(block.q_norm, shape.head_dim)
    struct.k_norm = _vector(block.k_norm, shape.head_dim)
    for i, (linear, bias) in enumerate(zip(block.linears, block.biases, strict=True)):
        struct.linears[i] = _weight_struct(linear)
        struct.biases[i] = None if linear is None else _vector(bias, linear.shape[0])


def _ends_struct(ends: Ends, shape: Shape) -> EndsStruct:
    return EndsStruct(
        _weight_struct(ends.embedding),
        _weight_struct(ends.head),
        _norm_struct(ends.embedding_norm, shape.hidden),
        _norm_struct(ends.norm, shape.hidden),
        _weight_struct(ends.positions),
        ends.first_position,
        _vector(ends.frequencies, shape.rotary_dim // 2),
        _vector(ends.slopes, shape.heads),
    )


def _norm_struct(norm: Norm | None, size: int) -> NormStruct:
    """Without a gain where there is no norm."""
    if norm is None:
        return NormStruct()
    return NormStruct(_vector(norm.gain, size), _vector(norm.bias, size))


def _weight_struct(weight: PackedWeight | None) -> WeightStruct:
    """Without data where there is no weight; the library compares its sizes with the shape."""
    return WeightStruct() if weight is None else weight.struct


def _vector(tensor: Tensor | None, size: int) -> int | None:
    """Where its floats are, which have to stay there."""
    if tensor is None:
        return None
    return address(tensor, "a vector of the decoder", torch.float32, size)
