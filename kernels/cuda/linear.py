"""2:4 linears on sparse tensor cores, as an operator of torch, so that torch.compile takes it.

It computes on CPU tensors too, slowly: by the dense matrix that it stands for.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from torch.nn import functional

from .dense import dense_of_fragments
from .fragments import WHOLE_COLUMNS, unpack
from .sparse_gemm import sparse_gemm
from .steps import add_up
from .targets import ARCHITECTURES, Architecture
from .variants import Choice, Product, Variant, choose

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}
ROWS_MULTIPLE = 16  # results are written 16 bytes at a time, wherever rows begin
COLUMNS_MULTIPLE = 16  # and tokens read so


@cache
def limits_of(device: int) -> tuple[Architecture, int] | None:
    """A GPU's limits and multiprocessors; None where it has no mma.sp that these kernels know."""
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    known = ARCHITECTURES.get(arch)
    return None if known is None else (known, properties.multi_processor_count)


@torch.library.custom_op("halfweave::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    group: int,
) -> Tensor:
    """y [..., rows] = x [..., K] W^T (+ bias) (+ residual), W in fragment order (fragments.py).

    K and `rows` are multiples of 16; x, bias, residual and float weights have one dtype of KINDS.
    """
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    chosen = _chosen(inputs, rows, group)
    if chosen.tile is None:
        dense = dense_of_fragments(values, meta, scales, (rows, x.shape[-1]), group, x.dtype)
        y = functional.linear(x, dense, bias)
        return y if residual is None else y + residual
    fused = chosen.splits == 1  # else bias and residual are added with the parts
    added = (bias, residual) if fused else (None, None)
    y = inputs.new_empty(len(inputs), rows)
    parts = y if fused else _room(inputs, rows, chosen.splits)
    _launch(inputs, (values, meta, scales), added, parts, group, chosen)
    if not fused:
        add_up(parts, bias, residual, y)
    return y.view(*x.shape[:-1], rows)


def sparse_parts(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor | None, rows: int, group: int
) -> Tensor:
    """As `sparse_linear`, of x [M, K], but where K is parted the parts fp32 [splits, M, rows]."""
    inputs = x.contiguous()
    chosen = _chosen(inputs, rows, group)
    if chosen.splits == 1:
        whole: Tensor = sparse_linear(inputs, values, meta, scales, None, None, rows, group)
        return whole
    y = _room(inputs, rows, chosen.splits)
    _launch(inputs, (values, meta, scales), (None, None), y, group, chosen)
    return y


def _chosen(inputs: Tensor, rows: int, group: int) -> Choice:
    found = limits_of(inputs.device.index)
    if found is None:
        raise NotImplementedError("this GPU has no sparse tensor cores that are known here")
    M, K = inputs.shape
    return choose(Product(M, rows, K, KINDS[inputs.dtype], group), *found)


def _room(inputs: Tensor, rows: int, splits: int) -> Tensor:
    return inputs.new_empty(splits, len(inputs), rows, dtype=torch.float32)


def _launch(
    inputs: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    added: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    group: int,
    chosen: Choice,
) -> None:
    """Compute y [M, rows], or its parts [splits, M, rows]; `added` are bias and residual."""
    (values, meta, scales), (bias, residual) = weight, added
    M, K = inputs.shape
    tile, rows = chosen.tile, y.shape[-1]
    assert tile is not None
    variant = Variant(
        tile,
        KINDS[inputs.dtype],
        group,
        whole_k=K % WHOLE_COLUMNS == 0,
        splits=chosen.splits > 1,
        bias=bias is not None,
        residual=residual is not None,
    )
    blocks = meta.shape[1]
    grid = (triton.cdiv(rows, tile.BN), triton.cdiv(M, tile.BM), chosen.splits)
    sparse_gemm[grid](
        inputs.view(torch.int32),
        values,
        meta,
        meta if scales is None else scales,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        M,
        rows,
        K,
        blocks,
        triton.cdiv(blocks // tile.WK, chosen.splits),
        V=variant,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )


@sparse_linear.register_kernel("cpu")
def _sparse_linear_on_cpu(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    group: int,
) -> Tensor:
    dense = unpack(values, meta, scales, group, x.dtype)[:rows, : x.shape[-1]]
    y = x.float() @ dense.float().T
    y = y if bias is None else y + bias.float()
    return (y if residual is None else y + residual.float()).to(x.dtype)


@sparse_linear.register_fake
def _(x, values, meta, scales, bias, residual, rows, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)
