"""Weights in the kernels' own layout (native/layout.hpp), and linears by them."""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import HalfweaveError
from ..formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from ..nibbles import SMALLEST_SCALE
from .library import Library, WeightStruct

KINDS = {Sparse24Int4.kind: 0, Int4.kind: 1, Int8.kind: 2}
_LINE = 64
_INT8_GROUP = 32  # the layout has scales for groups; an Int8 repeats its row's
_ROWS_AT_ONCE = 4096  # that are rounded, which bounds the floats beside them


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as the kernels read it. `struct` points into `data`."""

    shape: tuple[int, int]
    data: Tensor  # uint8, aligned to a line
    struct: WeightStruct


def pack_weight(library: Library, weight: PackedLinear) -> PackedWeight:
    """Repack a legal weight; its own tensors are not needed any more then.

    Raises:
        HalfweaveError: the kernels do not know its format, or its shape is beyond them.
    """
    if isinstance(weight, Dense | Sparse24):
        raise HalfweaveError(f"the CPU kernels do not know the format {weight.kind}")
    if isinstance(weight, Int8):
        groups = -(-weight.shape[1] // _INT8_GROUP)
        scale = weight.scale.expand(len(weight.scale), groups)
        return pack_int8(library, weight.values, scale)
    meta = weight.meta if isinstance(weight, Sparse24Int4) else None
    return _pack(
        library, weight.kind, weight.shape, weight.group, (weight.values, meta, weight.scale)
    )


def pack_int8(library: Library, codes: Tensor, scale: Tensor) -> PackedWeight:
    """A weight of int8 codes [N, K] with a scale fp16 [N, K/32] for 32 columns of a row."""
    rows, columns = codes.shape
    return _pack(library, Int8.kind, (rows, columns), _INT8_GROUP, (codes, None, scale))


def round_to_int8(library: Library, weight: Tensor) -> PackedWeight:
    """A float weight [N, K] in 8 bits: the nearest of 255 levels per row and 32 columns."""
    rows, columns = weight.shape
    padded = -columns % _INT8_GROUP
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, (columns + padded) // _INT8_GROUP, dtype=torch.float16)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        groups = functional.pad(weight[part].float(), (0, padded)).unflatten(1, (-1, _INT8_GROUP))
        scale[part] = (groups.abs().amax(dim=-1) / 127).clamp_min(SMALLEST_SCALE)
        rounded = torch.round(groups / scale[part].float()[..., None]).clamp(-127, 127)
        codes[part] = rounded.flatten(1)[:, :columns]
    return pack_int8(library, codes, scale)


def _pack(
    library: Library,
    kind: str,
    shape: tuple[int, int],
    group: int,
    tensors: tuple[Tensor, Tensor | None, Tensor],
) -> PackedWeight:
    """`tensors` are values, meta and scales, as the checkpoint has them."""
    size = library.functions.hw_packed_bytes(KINDS[kind], group, *shape)
    if size < 0:
        raise HalfweaveError(f"a {kind} weight of {shape[0]} x {shape[1]} cannot be packed")
    data = aligned_bytes(size)
    struct = WeightStruct(KINDS[kind], group, *shape, data.data_ptr(), size)
    stored = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in stored]
    library.call("hw_pack", library.pool, struct, *pointers, data.data_ptr())
    return PackedWeight(shape, data, struct)


def linear(library: Library, weight: PackedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """y [..., N] = x W^T + b in fp32, x [..., K] rounded to 8 bits per token and 32 columns.

    Raises:
        ValueError: x or the bias does not fit the weight.
    """
    rows, columns = weight.shape
    if x.shape[-1] != columns or (bias is not None and tuple(bias.shape) != (rows,)):
        raise ValueError(f"an input of {x.shape[-1]} columns does not fit {rows} x {columns}")
    inputs = x.to(torch.float32).contiguous()
    y = torch.empty(*x.shape[:-1], rows)
    offset = None if bias is None else bias.to(torch.float32).contiguous()
    tokens = inputs.numel() // columns
    if tokens:
        library.call(
            "hw_linear",
            library.level_pointer,
            library.pool,
            byref(weight.struct),
            inputs.data_ptr(),
            tokens,
            None if offset is None else offset.data_ptr(),
            y.data_ptr(),
        )
    return y


def aligned_bytes(size: int) -> Tensor:
    """Uninitialised uint8 [size] that begins on a line of the cache."""
    buffer = torch.empty(size + _LINE, dtype=torch.uint8)
    start = -buffer.data_ptr() % _LINE
    return buffer[start : start + size]
