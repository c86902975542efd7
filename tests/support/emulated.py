"""The sparse product on a GPU that is not there: compiled for it, and run by the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from halfweave.kernels.cuda.build import Row, build
from halfweave.kernels.cuda.fragments import (
    FragmentWeight,
    from_int4,
    from_sparse24,
    from_sparse24_int4,
)
from halfweave.kernels.cuda.variants import Tile, Variant
from halfweave.kernels.formats import Int4, Sparse24, Sparse24Int4
from ptx.emulator import Emulator
from ptx.numbers import Array
from torch import Tensor
from torch.nn import functional

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
# Of the largest result: what rounding to 16 bits, and of scaled weights, can cost.
BOUNDS = {"f16": 2e-3, "bf16": 6e-3}


@dataclass(frozen=True)
class Case:
    """A product and how it is computed."""

    tile: Tile
    M: int
    N: int
    K: int
    kind: str = "f16"
    group: int = 0
    splits: int = 1
    bias: bool = False
    residual: bool = False
    dense: bool = False
    gated: bool = False
    arch: int = 80

    @property
    def variant(self) -> Variant:
        whole = self.K % (64 if self.dense else 128) == 0
        group = max(self.group, 32) if self.group < 64 else 128
        return Variant(
            self.tile,
            self.kind,
            group if self.dense else self.group,
            whole,
            self.splits > 1,
            self.bias,
            self.residual,
            self.dense,
            self.gated,
        )

    @property
    def width(self) -> int:
        """Results of a token."""
        return self.N // 2 if self.gated else self.N


@cache
def built(variant: Variant, arch: int) -> Row:
    return build(variant, arch)


def weight_of(case: Case) -> Sparse24 | Sparse24Int4 | Int4:
    """Random, and dense where the case is."""
    if not case.dense:
        return sparse_weight(case)
    generator = torch.Generator().manual_seed(case.N + case.K + case.group)
    codes = torch.randint(-8, 8, (case.N, case.K), generator=generator)
    groups = -(-case.K // case.group)
    scale = (torch.rand(case.N, groups, generator=generator) * 0.1 + 0.05).half()
    return Int4.from_codes(codes, scale, case.group)


def sparse_weight(case: Case) -> Sparse24 | Sparse24Int4:
    """Two random ones of every four, at random places."""
    generator = torch.Generator().manual_seed(case.N + case.K + case.group)
    weight = torch.randn(case.N, case.K, generator=generator)
    fours = torch.rand(case.N, case.K // 4, 4, generator=generator)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    keep = keep.scatter(2, fours.topk(2).indices, True).view(case.N, case.K)
    if not case.group:
        return Sparse24.from_dense((weight * keep).to(DTYPES[case.kind]))
    codes = torch.randint(-8, 8, weight.shape, generator=generator)
    groups = -(-case.K // case.group)
    scale = (torch.rand(case.N, groups, generator=generator) * 0.1 + 0.05).half()
    return Sparse24Int4.from_codes(codes, keep, scale, case.group)


def fragment_weight(weight: Sparse24 | Sparse24Int4 | Int4) -> FragmentWeight:
    if isinstance(weight, Int4):
        return from_int4(weight)
    return from_sparse24(weight) if isinstance(weight, Sparse24) else from_sparse24_int4(weight)


def error_of(
    case: Case,
    mutate: Callable[[str], str] = lambda ptx: ptx,
    look: Callable[[Emulator], None] = lambda emulator: None,
) -> float:
    """Greatest error of the emulated kernel over the greatest result of the oracle.

    `mutate` changes the program first; `look` sees the emulator afterwards.
    """
    dtype = DTYPES[case.kind]
    generator = torch.Generator().manual_seed(case.M)
    x = torch.randn(case.M, case.K, generator=generator).to(dtype)
    bias = torch.randn(case.N, generator=generator).to(dtype)
    residual = torch.randn(case.M, case.N, generator=generator).to(dtype)
    stored = weight_of(case)
    expected = x.float() @ stored.unpack().T
    expected += bias.float() if case.bias else 0
    expected += residual.float() if case.residual else 0
    if case.gated:
        g, u = expected.view(case.M, -1, 2, 8).unbind(2)
        expected = (functional.silu(g) * u).flatten(1)
    found = _emulated(case, fragment_weight(stored), (x, bias, residual), mutate, look)
    return float((found - expected).abs().max() / expected.abs().max())


def far_error(case: Case) -> float:
    """The error of the last tokens of a case, whose places are beyond 32 bits of an offset.

    Only they, and only they of x, residual and y, are there: the arrays begin where the last ones
    would, and the pointers as far before them as the program has to go. An offset that wraps leads
    elsewhere, which the emulator refuses. Of W only the first rows of a program are multiplied by.
    """
    compiled, stored = built(case.variant, case.arch).compiled, sparse_weight(case)
    weight, dtype = fragment_weight(stored), DTYPES[case.kind]
    tokens, rows = case.tile.BM, case.tile.BN
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, case.K, generator=generator).to(dtype)
    residual = torch.randn(tokens, case.N, generator=generator).to(dtype)
    emulator = Emulator(compiled.ptx, compiled.shared_bytes)
    put, before = emulator.memory.put, case.M - tokens
    out = put(np.zeros((tokens, case.N), np.int16))
    packed = [put(each.numpy()) for each in (weight.values, weight.meta, weight.meta)]
    pointers = [
        put(_bits(x).view(np.int32)) - 2 * before * case.K,
        *packed,
        put(np.zeros(case.N, np.int16)),
        put(_bits(residual)) - 2 * before * case.N,
        out - 2 * before * case.N,
    ]
    blocks = weight.blocks[1]
    arguments = [*pointers, case.M, case.N, case.K, blocks, blocks // case.tile.WK]
    programs = case.M // tokens
    emulator.run((-(-case.N // rows), programs), arguments, only=[(0, programs - 1, 0)])
    found = torch.from_numpy(emulator.memory.get(out)).view(dtype).float()[:, :rows]
    expected = (x.float() @ stored.unpack().T + residual.float())[:, :rows]
    return float((found - expected).abs().max() / expected.abs().max())


def _emulated(
    case: Case,
    weight: FragmentWeight,
    given: tuple[Tensor, Tensor, Tensor],
    mutate: Callable[[str], str],
    look: Callable[[Emulator], None],
) -> Tensor:
    compiled = built(case.variant, case.arch).compiled
    emulator = Emulator(mutate(compiled.ptx), compiled.shared_bytes)
    put = emulator.memory.put
    x, bias, residual = (_bits(each) for each in given)
    scales = np.zeros(4, np.int32) if weight.scales is None else weight.scales.numpy()
    shape = (case.splits, case.M, case.width)
    # Not a number, so that a result that is never written is seen.
    empty = np.full(shape, np.nan, np.float32) if case.splits > 1 else np.full(shape, -1, np.int16)
    out = put(empty)
    packed = [put(each) for each in (weight.values.numpy(), weight.meta.numpy(), scales)]
    arguments = [put(x.view(np.int32)), *packed, put(bias), put(residual), out]
    blocks = weight.blocks[1]
    steps = -(-(blocks // case.tile.WK) // case.splits)
    grid = (-(-case.N // case.tile.BN), -(-case.M // case.tile.BM), case.splits)
    emulator.run(grid, [*arguments, case.M, case.N, case.K, blocks, steps], counting=True)
    look(emulator)
    y = torch.from_numpy(emulator.memory.get(out))
    if case.splits > 1:
        return y.sum(0)
    return y[0].view(DTYPES[case.kind]).float()


def _bits(tensor: Tensor) -> Array:
    return tensor.contiguous().view(torch.int16).numpy()
