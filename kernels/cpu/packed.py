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
_LINE = 64
_ANY_GROUP = 32  # of weights without scales
_ROUNDED_GROUP = 32  # columns a scale, of what is rounded here; Int8 repeats that of its row


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernels read it. `struct` points into `data`."""

    shape: tuple[int, int]
    data: Tensor  # uint8, aligned to a line
    struct: WeightStruct


def pack_weight(library: Library, weight: PackedLinear) -> PackedWeight:
    """Repack a legal weight; its own tensors are not needed any more then.

    Raises:
        HalfweaveError: its shape is beyond the kernels, or one of its tensors is not legal.
    """
    if isinstance(weight, Dense):
        return _pack_floats(library, weight.kind, weight.shape, weight.weight, None)
    if isinstance(weight, Sparse24):
        return _pack_floats(library, weight.kind, weight.shape, weight.values, weight.meta)
    if isinstance(weight, Int8):
        groups = group_count(weight.shape[1], _ROUNDED_GROUP)
        tensors = (weight.values, None, weight.scale.expand(len(weight.scale), groups))
        return _pack(library, _CODES[Int8.kind], _ROUNDED_GROUP, weight.shape, tensors)
    meta = weight.meta if isinstance(weight, Sparse24Int4) else None
    stored = (weight.values, meta, weight.scale)
    return _pack(library, _CODES[weight.kind], weight.group, weight.shape, stored)


def round_weight(library: Library, weight: Tensor, bits: int) -> PackedWeight:
    """A float weight [N, K] in 8 or 4 bits, with a scale for 32 columns of a row.

    8 bits: the nearest of 255 levels up to the largest. 4 bits: of some scales the one with the
    least squared error.

    Raises:
        HalfweaveError: its shape or type is beyond the kernels.
    """
    rows, columns = weight.shape
    kind, from_kind = {8: Int8.kind, 4: Int4.kind}[bits], _float_kind(Dense.kind, weight.dtype)
    packed = _new(library, _CODES[kind], _ROUNDED_GROUP, (rows, columns))
    values = weight.contiguous()
    stored = address(values, "a weight", weight.dtype, rows, columns)
    library.call("hw_round", library.pool, packed.struct, from_kind, stored, packed.struct.data)
    return packed


def _float_kind(kind: str, dtype: torch.dtype) -> int:
    if (kind, dtype) not in _FLOATS:
        raise HalfweaveError(f"weights of {dtype} cannot be packed")
    return _FLOATS[kind, dtype]


def _pack_floats(
    library: Library, kind: str, shape: tuple[int, int], values: Tensor, meta: Tensor | None
) -> PackedWeight:
    number = _float_kind(kind, values.dtype)
    return _pack(library, number, _ANY_GROUP, shape, (values, meta, None))


def _pack(
    library: Library,
    kind: int,
    group: int,
    shape: tuple[int, int],
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
) -> PackedWeight:
    """`tensors` are values, meta and scales, as the checkpoint has them."""
    packed, (rows, columns) = _new(library, kind, group, shape), shape
    wanted = (
        ("values", _STORED.get(kind, tensors[0].dtype), *tensors[0].shape),
        ("meta", torch.uint8, rows, group_count(columns, 8)),
        ("scale", torch.float16, rows, group_count(columns, group)),
    )
    stored = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = [
        None if tensor is None else address(tensor, *each)
        for tensor, each in zip(stored, wanted, strict=True)
    ]
    library.call("hw_pack", library.pool, packed.struct, *pointers, packed.struct.data)
    return packed


def _new(library: Library, kind: int, group: int, shape: tuple[int, int]) -> PackedWeight:
    """Memory for a weight; what is in it is undefined."""
    size = _size(library, kind, group, shape)
    data = aligned_bytes(size)
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


def aligned_bytes(size: int) -> Tensor:
    """Uninitialised uint8 [size] that begins on a line of the cache."""
    buffer = torch.empty(size + _LINE, dtype=torch.uint8)
    start = -buffer.data_ptr() % _LINE
    return buffer[start : start + size]
