"""Weights in the kernels' own layout (native/layout.hpp), and linears by them."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import HalfweaveError
from ..formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from ..groups import group_count
from .library import Library, WeightStruct, address
from .room import Room, aligned_bytes

# Numbers of api.h: of formats with codes, and of those with floats by what these are stored as.
_CODES = {Sparse24Int4.kind: 0, Int4.kind: 1, Int8.kind: 2}
_FLOATS = {
    (kind, dtype): 3 + i
    for i, (kind, dtype) in enumerate(
        (kind, dtype)
        for kind in (Sparse24.kind, Dense.kind)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    )
}
_STORED = {0: torch.uint8, 1: torch.uint8, 2: torch.int8}  # what a checkpoint's codes are in
CODED = frozenset(_CODES)  # formats whose inputs are rounded to 8 bits
_ANY_GROUP = 32  # of weights without scales
_ROUNDED_GROUP = 32  # columns a scale, of what is rounded here; Int8 repeats that of its row


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernels read it. `struct` points into `data`."""

    shape: tuple[int, int]
    data: Tensor  # uint8, aligned to a line
    struct: WeightStruct


def pack_weight(library: Library, weight: PackedLinear, room: Room | None = None) -> PackedWeight:
    """Repack a legal weight, into `room` if given; its own tensors are not needed any more then.

    Raises:
        HalfweaveError: its shape is beyond the kernels, or one of its tensors is not legal.
    """
    kind, group, tensors = _as_stored(weight)
    packed = _new(library, kind, group, weight.shape, room)
    stored = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = _addresses(packed, stored)
    library.call("hw_pack", library.pool, packed.struct, *pointers, packed.struct.data)
    return packed


def _as_stored(weight: PackedLinear) -> tuple[int, int, list[Tensor | None]]:
    """Number of the kind, columns that share a scale, and values, meta and scales."""
    if isinstance(weight, Dense):
        kind = _float_kind(weight.kind, weight.weight.dtype)
        return kind, _ANY_GROUP, [weight.weight, None, None]
    if isinstance(weight, Sparse24):
        kind = _float_kind(weight.kind, weight.values.dtype)
        return kind, _ANY_GROUP, [weight.values, weight.meta, None]
    if isinstance(weight, Int8):
        scale = weight.scale.expand(-1, group_count(weight.shape[1], _ROUNDED_GROUP))
        return _CODES[Int8.kind], _ROUNDED_GROUP, [weight.values, None, scale]
    meta = weight.meta if isinstance(weight, Sparse24Int4) else None
    return _CODES[weight.kind], weight.group, [weight.values, meta, weight.scale]


def _addresses(packed: PackedWeight, stored: list[Tensor | None]) -> list[int | None]:
    """Where values, meta and scales are, if they are what the weight's shape asks for."""
    (rows, columns), struct = packed.shape, packed.struct
    values = stored[0]
    assert values is not None
    wanted = (
        ("values", _STORED.get(struct.kind, values.dtype), *values.shape),
        ("meta", torch.uint8, rows, group_count(columns, 8)),
        ("scale", torch.float16, rows, group_count(columns, struct.group)),
    )
    return [
        None if tensor is None else address(tensor, *each)
        for tensor, each in zip(stored, wanted, strict=True)
    ]


def round_weight(
    library: Library, weight: Tensor, bits: int, room: Room | None = None
) -> PackedWeight:
    """A float weight [N, K] in 8 or 4 bits, with a scale for 32 columns of a row.

    8 bits: the nearest of 255 levels up to the largest. 4 bits: of some scales the one with the
    least squared error.

    Raises:
        HalfweaveError: its shape or type is beyond the kernels.
    """
    rows, columns = weight.shape
    kind, from_kind = {8: Int8.kind, 4: Int4.kind}[bits], _float_kind(Dense.kind, weight.dtype)
    packed = _new(library, _CODES[kind], _ROUNDED_GROUP, (rows, columns), room)
    values = weight.contiguous()
    stored = address(values, "a weight", weight.dtype, rows, columns)
    library.call("hw_round", library.pool, packed.struct, from_kind, stored, packed.struct.data)
    return packed


def _float_kind(kind: str, dtype: torch.dtype) -> int:
    if (kind, dtype) not in _FLOATS:
        raise HalfweaveError(f"weights of {dtype} cannot be packed")
    return _FLOATS[kind, dtype]


def _new(
    library: Library, kind: int, group: int, shape: tuple[int, int], room: Room | None
) -> PackedWeight:
    """Memory for a weight; what is in it is undefined."""
    size = _size(library, kind, group, shape)
    data = aligned_bytes(size) if room is None else room.take(size)
    return PackedWeight(shape, data, WeightStruct(kind, group, *shape, data.data_ptr(), size))


def _size(library: Library, kind: int, group: int, shape: tuple[int, int]) -> int:
    size = int(library.functions.hw_packed_bytes(kind, group, *shape))
    if size < 0:
        raise HalfweaveError(f"a weight of {shape[0]} x {shape[1]} cannot be packed")
    return size


def packed_bytes(
    library: Library,
    kind: str,
    shape: tuple[int, int],
    group: int | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes of a weight [N, K] as the kernels read it; `dtype` is that of its floats, if any.

    Raises:
        HalfweaveError: its shape is beyond the kernels.
    """
    if kind == Int8.kind:
        group = _ROUNDED_GROUP
    number = _CODES[kind] if dtype is None else _float_kind(kind, dtype)
    return _size(library, number, group or _ANY_GROUP, shape)


def linear(library: Library, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] = x W^T + b in fp32; where W has codes, x [..., K] is rounded to 8 bits per token
    and 32 columns.

    Raises:
        ValueError: x or the bias does not fit the weight.
        HalfweaveError: one of them is not in this machine's memory.
    """
    rows, columns = weight.shape
    if x.shape[-1] != columns or (bias is not None and tuple(bias.shape) != (rows,)):
        raise ValueError(f"an input of {x.shape[-1]} columns does not fit {rows} x {columns}")
    inputs = x.to(torch.float32).contiguous()
    start = address(inputs, "an input", torch.float32, *x.shape)
    y = torch.empty(*x.shape[:-1], rows)
    offset = None if bias is None else bias.to(torch.float32).contiguous()
    offset_start = None if offset is None else address(offset, "a bias", torch.float32, rows)
    tokens = inputs.numel() // columns
    if tokens:
        library.call(
            "hw_linear",
            library.level_pointer,
            library.pool,
            byref(weight.struct),
            start,
            tokens,
            offset_start,
            y.data_ptr(),
        )
    return y
