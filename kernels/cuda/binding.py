"""Binds a stored weight to the operator that multiplies by it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional

from ..formats import Int4, PackedLinear, Sparse24, Sparse24Int4
from .choices import limits_of
from .fragments import FragmentWeight, from_int4, from_sparse24, from_sparse24_int4
from .linear import (
    COLUMNS_MULTIPLE,
    GATE_RUN,
    KINDS,
    ROWS_MULTIPLE,
    multiply,
    multiply_gated,
    multiply_in_parts,
    sparse_linear,
)
from .plain_linear import expanded_linear, int4_linear
from .steps import gated

LinearFunction = Callable[[Tensor], Tensor]


def has_kernel(weight: PackedLinear, dtype: torch.dtype) -> bool:
    """Whether there is anything better than a dense matrix for it."""
    return dtype in KINDS and isinstance(weight, Sparse24 | Sparse24Int4 | Int4)


def bind(
    weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    """A function from x [..., K] to [..., N], both of `dtype` (one of KINDS) on `device`."""
    offset = None if bias is None else bias.to(device, dtype)
    assert isinstance(weight, Sparse24 | Sparse24Int4 | Int4)
    if _has_sparse_cores(device):
        return SparseLinear.of(weight, offset, device, dtype)
    if isinstance(weight, Int4):
        return _bind_int4(weight, offset, device)
    return _bind_expanded(weight, offset, device, dtype)


@dataclass(frozen=True)
class SparseLinear:
    """A weight on sparse tensor cores; rows and columns are filled up to whole vectors."""

    weight: FragmentWeight
    bias: Tensor | None  # [rows]
    rows: int

    @classmethod
    def of(
        cls,
        weight: Sparse24 | Sparse24Int4 | Int4,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SparseLinear:
        """Repack a weight, on the device; float values become `dtype`."""
        there = weight.to(device)
        if isinstance(there, Sparse24):
            packed = from_sparse24(Sparse24(there.values.to(dtype), there.meta))
        else:
            packed = from_int4(there) if isinstance(there, Int4) else from_sparse24_int4(there)
        rows = -(-packed.shape[0] // ROWS_MULTIPLE) * ROWS_MULTIPLE
        offset = None if bias is None else functional.pad(bias, (0, rows - len(bias)))
        return cls(packed, offset, rows)

    def __call__(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K]."""
        rows = self.weight.shape[0]
        y = self._multiply(self._filled(x))
        return y if rows == self.rows else y[..., :rows].contiguous()

    def _filled(self, x: Tensor) -> Tensor:
        missing = -self.weight.shape[1] % COLUMNS_MULTIPLE
        return functional.pad(x, (0, missing)) if missing else x

    def _multiply(self, x: Tensor) -> Tensor:
        """By the operator where torch compiles: it sees no kernel's insides otherwise."""
        weight = self.weight
        if not torch.compiler.is_compiling():
            return multiply(x, weight, self.rows, self.bias)
        packed = weight.values, weight.meta, weight.scales
        y: Tensor = sparse_linear(x, *packed, self.bias, None, self.rows, weight.group)
        return y

    def parts(self, x: Tensor) -> Tensor:
        """The same [M, N] of x [M, K], or fp32 parts of it [splits, M, N] to be added up."""
        rows, columns = self.weight.shape
        if self.bias is not None or rows != self.rows or columns % COLUMNS_MULTIPLE:
            return self(x)
        return multiply_in_parts(x, self.weight, rows)

    def let_through(self, x: Tensor) -> Tensor:
        """silu(g) u [M, N / 2] of x [M, K], for g and u that take turns in the weight's rows."""
        return multiply_gated(self._filled(x), self.weight, self.rows, self.bias)


@dataclass(frozen=True)
class GatedLinear:
    """silu(gate(x)) * up(x), of a product that gives both: in turns, or one behind the other."""

    both: LinearFunction
    in_turns: bool

    def __call__(self, x: Tensor) -> Tensor:
        """y [M, N / 2] for x [M, K]."""
        if self.in_turns and isinstance(self.both, SparseLinear) and x.is_cuda:
            return self.both.let_through(x)
        return gated(parts_of(self.both, x), x.dtype, GATE_RUN if self.in_turns else 0)


def parts_of(linear: LinearFunction, x: Tensor) -> Tensor:
    """What a linear gives, unless the next kernel may add parts of it, which are faster to have."""
    return linear.parts(x) if isinstance(linear, SparseLinear) and x.is_cuda else linear(x)


def _bind_expanded(
    weight: Sparse24 | Sparse24Int4, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    meta = weight.meta.to(device)
    if isinstance(weight, Sparse24):
        floats = weight.values.to(device, dtype)
        return lambda x: expanded_linear(x, floats, meta, None, bias, 0)
    codes, scale, group = weight.values.to(device), weight.scale.to(device), weight.group
    return lambda x: expanded_linear(x, codes, meta, scale, bias, group)


def _bind_int4(weight: Int4, bias: Tensor | None, device: torch.device) -> LinearFunction:
    codes, scale, group = weight.values.to(device), weight.scale.to(device), weight.group
    return lambda x: int4_linear(x, codes, scale, bias, group)


def _has_sparse_cores(device: torch.device) -> bool:
    """Also of a CPU, where the operator is computed without them, unless Triton interprets."""
    if device.type == "cpu":
        return not triton.knobs.runtime.interpret
    index = torch.cuda.current_device() if device.index is None else device.index
    return limits_of(index) is not None
