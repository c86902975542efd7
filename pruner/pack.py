"""From a method's result to the format it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CapacityError
from ..kernels.formats import Dense, Int4, Int8, PackedLinear, Sparse24, Sparse24Int4
from .methods.base import Pruned, Target


def stored_format(target: Target) -> str:
    """Name of the format that holds results of this target."""
    if target.bits == 8:
        return Int8.kind
    if target.bits == 4:
        return Sparse24Int4.kind if target.pattern.is_24 else Int4.kind
    return Sparse24.kind if target.pattern.is_24 else Dense.kind


def why_not(shape: tuple[int, int], target: Target) -> str | None:
    """Why a linear of this shape cannot take the target, or None if it can."""
    columns = shape[1]
    multiple = target.pattern.of or (2 if target.bits == 4 else 1)
    if columns % multiple:
        return f"K = {columns} is not a multiple of {multiple}"
    return None


def pack(pruned: Pruned, target: Target, dtype: torch.dtype, name: str) -> PackedLinear:
    """Pack a result; `dtype` is that of the source weight and of 16-bit values.

    Raises:
        CapacityError: a value overflows `dtype` (fp16 sources only, in practice).
    """
    if pruned.codes is not None and pruned.scale is not None:
        if target.pattern.is_24:
            return Sparse24Int4.from_codes(
                pruned.codes, pruned.keep, pruned.scale, target.group, name
            )
        return Int4.from_codes(
            torch.where(pruned.keep, pruned.codes, 0), pruned.scale, target.group
        )
    if target.bits == 8:
        return Int8.from_dense(pruned.weight)
    weight = _cast(pruned.weight, dtype, name)
    return Sparse24.from_dense(weight, name) if target.pattern.is_24 else Dense(weight)


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise CapacityError(
            f"{name}: a compensated weight is too large for {dtype}",
            "raise --damping, or calibrate on more text",
        )
    return cast
