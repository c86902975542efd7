"""The five ways a linear layer's weight can be stored: pack, unpack, validate.

docs/format.md is the specification of these layouts; this file is its only implementation. Shapes
follow torch: a weight is [N, K] = [out, in]. Knows nothing of models, files, or speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import nibbles
from .groups import check_scales, expand_groups, group_count

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_SIZES = (32, 64, 128)


class _Stored:
    """What the formats share: named tensors. Each tensor's suffix is the name of its field."""

    kind: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by suffix."""
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}

    def to(self, device: torch.device) -> Self:
        """The same linear with its tensors on another device."""
        moved: dict[str, Any] = {suffix: t.to(device) for suffix, t in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[type-var]

    def rows(self, index: Tensor) -> Self:
        """The linear of some of the rows; `index` is int64."""
        taken: dict[str, Any] = {suffix: t[index] for suffix, t in self.tensors().items()}
        return replace(self, **taken)  # type: ignore[type-var]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True)
class Dense(_Stored):
    """A weight as it is: float [N, K]. Also holds unstructured and 4:8 zeros."""

    kind: ClassVar[str] = "dense"
    suffixes: ClassVar[tuple[str, ...]] = ("weight",)
    weight: Tensor  # [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]."""
        return self.weight.to(dtype)

    def validate(self, name: str) -> None:
        """Raise CheckpointError unless this is a float matrix.

        Values are not looked at: a dense weight is served as its author made it.
        """
        _check_float(name, "weight", self.weight)


@dataclass(frozen=True)
class Sparse24(_Stored):
    """2:4 sparse, 16-bit values: `values` float [N, K/2] and `meta` uint8 [N, ceil(K/8)]."""

    kind: ClassVar[str] = "sparse24"
    suffixes: ClassVar[tuple[str, ...]] = ("values", "meta")
    values: Tensor  # [N, K/2], kept values left to right
    meta: Tensor  # [N, ceil(K/8)], one nibble per group of four

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return int(self.values.shape[0]), 2 * int(self.values.shape[1])

    @classmethod
    def from_dense(cls, weight: Tensor, name: str = "weight") -> Sparse24:
        """Pack [N, K] that is already 2:4.

        Raises:
            CheckpointError: K is not a multiple of 4, or a group of four has over two non-zeros.
        """
        indices = nibbles.kept_indices(weight, name)
        values = nibbles.gather_kept(weight, indices)
        return cls(values.contiguous(), nibbles.pack_meta(indices))

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K], zeros filled in."""
        indices = nibbles.unpack_meta(self.meta, self.shape[1])
        return nibbles.scatter_kept(self.values.to(dtype), indices)

    def validate(self, name: str) -> None:
        """Raise CheckpointError unless shapes, dtypes, indices and values are legal."""
        rows, columns = self.shape
        _check_float(name, "values", self.values)
        _check_finite(name, "values", self.values)
        nibbles.check_meta(name, self.meta, rows, columns)


@dataclass(frozen=True)
class Sparse24Int4(_Stored):
    """2:4 sparse with 4-bit kept values and one scale per row and group of K.

    `codes` uint8 [N, K/4] holds two codes a byte, low nibble first, code = q + 8 with q in -8..7;
    `meta` as in Sparse24; `scale` fp16 [N, ceil(K/group)]. A kept weight is q * scale.
    """

    kind: ClassVar[str] = "sparse24_int4"
    suffixes: ClassVar[tuple[str, ...]] = ("values", "meta", "scale")
    values: Tensor  # [N, K/4] uint8
    meta: Tensor  # [N, ceil(K/8)] uint8
    scale: Tensor  # [N, ceil(K/group)] fp16
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return int(self.values.shape[0]), 4 * int(self.values.shape[1])

    @classmethod
    def from_codes(
        cls, codes: Tensor, keep: Tensor, scale: Tensor, group: int, name: str = "weight"
    ) -> Sparse24Int4:
        """Pack integer codes q [N, K] in -8..7 of which at most the `keep` [N, K] ones count.

        `keep` decides the slots, since a kept weight may well round to code 0.
        """
        indices = nibbles.kept_indices(keep, name)
        kept = nibbles.gather_kept(torch.where(keep, codes, 0).to(torch.int16), indices)
        packed = nibbles.pack_nibbles((kept + 8).to(torch.uint8))
        return cls(packed, nibbles.pack_meta(indices), scale.contiguous(), group)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: q * scale in fp32, then cast."""
        columns = self.shape[1]
        kept = nibbles.unpack_nibbles(self.values).to(torch.float32) - 8
        indices = nibbles.unpack_meta(self.meta, columns)
        codes = nibbles.scatter_kept(kept, indices)
        return (codes * expand_groups(self.scale.float(), self.group, columns)).to(dtype)

    def validate(self, name: str) -> None:
        """Raise CheckpointError unless shapes, dtypes, indices and scales are legal."""
        rows, columns = self.shape
        _check_tensor(name, "values", self.values, (rows, columns // 4), torch.uint8)
        nibbles.check_meta(name, self.meta, rows, columns)
        check_scales(name, self.scale, rows, columns, self.group)


@dataclass(frozen=True)
class Int4(_Stored):
    """Dense 4-bit: `values` uint8 [N, K/2], low nibble first; `scale` fp16 [N, ceil(K/group)]."""

    kind: ClassVar[str] = "int4"
    suffixes: ClassVar[tuple[str, ...]] = ("values", "scale")
    values: Tensor  # [N, K/2] uint8
    scale: Tensor  # [N, ceil(K/group)] fp16
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return int(self.values.shape[0]), 2 * int(self.values.shape[1])

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, group: int) -> Int4:
        """Pack integer codes q [N, K] in -8..7; K must be even."""
        packed = nibbles.pack_nibbles((codes.to(torch.int16) + 8).to(torch.uint8))
        return cls(packed, scale.contiguous(), group)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: q * scale in fp32, then cast."""
        codes = nibbles.unpack_nibbles(self.values).to(torch.float32) - 8
        scale = expand_groups(self.scale.float(), self.group, self.shape[1])
        return (codes * scale).to(dtype)

    def validate(self, name: str) -> None:
        """Raise CheckpointError unless shapes, dtypes and scales are legal."""
        rows, columns = self.shape
        _check_tensor(name, "values", self.values, (rows, columns // 2), torch.uint8)
        check_scales(name, self.scale, rows, columns, self.group)


@dataclass(frozen=True)
class Int8(_Stored):
    """Dense 8-bit, one scale per row: `values` int8 [N, K], `scale` fp16 [N, 1]."""

    kind: ClassVar[str] = "int8"
    suffixes: ClassVar[tuple[str, ...]] = ("values", "scale")
    values: Tensor  # [N, K] int8
    scale: Tensor  # [N, 1] fp16

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return int(self.values.shape[0]), int(self.values.shape[1])

    @classmethod
    def from_dense(cls, weight: Tensor) -> Int8:
        """Round each row to the nearest of 255 symmetric levels, scale = max|w| / 127."""
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        scale = (largest / 127).clamp_min(nibbles.SMALLEST_SCALE).to(torch.float16)
        codes = torch.round(weight.float() / scale.float()).clamp(-127, 127)
        return cls(codes.to(torch.int8), scale)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]: q * scale in fp32, then cast."""
        return (self.values.float() * self.scale.float()).to(dtype)

    def validate(self, name: str) -> None:
        """Raise CheckpointError unless shapes, dtypes and scales are legal."""
        rows, columns = self.shape
        _check_tensor(name, "values", self.values, (rows, columns), torch.int8)
        check_scales(name, self.scale, rows, columns, columns)


PackedLinear = Dense | Sparse24 | Sparse24Int4 | Int4 | Int8

FORMATS: Mapping[str, type[PackedLinear]] = {
    kind.kind: kind for kind in (Dense, Sparse24, Sparse24Int4, Int4, Int8)
}


def stacked(parts: Sequence[PackedLinear]) -> PackedLinear:
    """One linear with the rows of several, in order; all are of one format and group, and of K."""
    if len(parts) == 1:
        return parts[0]
    rows: dict[str, Any] = {
        suffix: torch.cat([getattr(part, suffix) for part in parts]) for suffix in parts[0].suffixes
    }
    return replace(parts[0], **rows)


def with_rows(weight: PackedLinear, rows: Tensor) -> PackedLinear:
    """The linear of some rows of another, in any order; every format keeps rows apart."""
    moved: dict[str, Any] = {name: tensor[rows] for name, tensor in weight.tensors().items()}
    return replace(weight, **moved)


def needs_group(kind: str) -> bool:
    """Whether a format stores one scale per group of K."""
    return kind in (Sparse24Int4.kind, Int4.kind)


def from_tensors(
    kind: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], group: int | None, name: str
) -> PackedLinear:
    """Put stored tensors back together and prove that they are a legal weight of `shape`.

    Raises:
        CheckpointError: a tensor is missing, has another dtype or shape, or holds illegal values.
    """
    missing = [suffix for suffix in FORMATS[kind].suffixes if suffix not in tensors]
    if missing:
        raise CheckpointError(f"{name}: the tensors {missing} of format {kind} are missing")
    for suffix in FORMATS[kind].suffixes:
        if tensors[suffix].dim() != 2:
            raise CheckpointError(f"{name}.{suffix} is not a matrix: {list(tensors[suffix].shape)}")
    packed = _assemble(kind, tensors, group)
    if packed.shape != shape:
        raise CheckpointError(
            f"{name}: expected shape {list(shape)}, found {list(packed.shape)} ({kind})"
        )
    packed.validate(name)
    return packed


def _assemble(kind: str, tensors: Mapping[str, Tensor], group: int | None) -> PackedLinear:
    if kind == Dense.kind:
        return Dense(tensors["weight"])
    if kind == Sparse24.kind:
        return Sparse24(tensors["values"], tensors["meta"])
    if kind == Int8.kind:
        return Int8(tensors["values"], tensors["scale"])
    if group is None:
        raise CheckpointError(f"format {kind} needs a group size")
    if kind == Int4.kind:
        return Int4(tensors["values"], tensors["scale"], group)
    return Sparse24Int4(tensors["values"], tensors["meta"], tensors["scale"], group)


def expected_tensors(
    kind: str, shape: tuple[int, int], group: int | None
) -> dict[str, tuple[int, int]]:
    """Stored shape of each tensor of a format, by suffix, from the logical shape (N, K)."""
    rows, columns = shape
    shapes = {
        Dense.kind: {"weight": (rows, columns)},
        Sparse24.kind: {"values": (rows, columns // 2)},
        Sparse24Int4.kind: {"values": (rows, columns // 4)},
        Int4.kind: {"values": (rows, columns // 2)},
        Int8.kind: {"values": (rows, columns), "scale": (rows, 1)},
    }[kind]
    if kind in (Sparse24.kind, Sparse24Int4.kind):
        shapes["meta"] = (rows, -(-columns // 8))
    if group is not None:
        shapes["scale"] = (rows, group_count(columns, group))
    return shapes


def _check_tensor(
    name: str, suffix: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name}.{suffix}: expected {dtype} {list(shape)}, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )


def _check_float(name: str, suffix: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{name}.{suffix}: {tensor.dtype} is no dtype for weights")


def _check_finite(name: str, suffix: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        row, column = torch.nonzero(~finite)[0].tolist()
        raise CheckpointError(f"{name}.{suffix} is not finite at [{row}, {column}]")
