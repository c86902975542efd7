"""Linears on sparse tensor cores, and as an operator of torch, so that torch.compile takes them.

They are computed on CPU tensors too, slowly: by the dense matrix that the weight stands for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.nn import functional

from .choices import choice_on
from .dense import dense_of_fragments
from .fragments import WHOLE_COLUMNS, FragmentWeight, unpack
from .launch import fits, on_its_device, pieces
from .sparse_gemm import sparse_gemm
from .steps import add_up, gated
from .variants import Choice, Product, Variant

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}
ROWS_MULTIPLE = 16  # results are written 16 bytes at a time, wherever rows begin
COLUMNS_MULTIPLE = 16  # and tokens read so
GATE_RUN = 8  # rows of a gate, then as many of what it lets through: those of one lane's sums


@on_its_device
def multiply(
    x: Tensor,
    weight: FragmentWeight,
    rows: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    chosen: Choice | None = None,
) -> Tensor:
    """y [..., rows] = x [..., K] W^T (+ bias) (+ residual), by a tile that is `chosen` or found.

    K and `rows` are multiples of 16; x, bias, residual and float weights have one dtype of KINDS.
    """
    if not x.is_cuda:
        return _on_cpu(x, weight, rows, bias, residual)
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    chosen = _settled(inputs, weight, rows, chosen)
    if chosen.tile is None:
        y = functional.linear(x, dense_of_fragments(weight, rows, x.shape[-1], x.dtype), bias)
        return y if residual is None else y + residual
    residual = None if residual is None else residual.reshape(-1, rows).contiguous()
    fused = chosen.splits == 1  # else bias and residual are added with the parts
    added = (bias, residual) if fused else (None, None)
    y = inputs.new_empty(len(inputs), rows)
    parts = y if fused else _room(inputs, rows, chosen.splits)
    _launch(inputs, weight, added, parts, chosen)
    if not fused:
        add_up(parts, bias, residual, y)
    return y.view(*x.shape[:-1], rows)


@on_its_device
def multiply_in_parts(
    x: Tensor, weight: FragmentWeight, rows: int, chosen: Choice | None = None
) -> Tensor:
    """As `multiply`, of x [M, K], but where K is parted the parts fp32 [splits, M, rows]."""
    if not x.is_cuda:
        return multiply(x, weight, rows)
    inputs = x.contiguous()
    chosen = _settled(inputs, weight, rows, chosen)
    if chosen.splits == 1:
        return multiply(inputs, weight, rows, chosen=chosen)
    parts = _room(inputs, rows, chosen.splits)
    _launch(inputs, weight, (None, None), parts, chosen)
    return parts


@on_its_device
def multiply_gated(
    x: Tensor,
    weight: FragmentWeight,
    rows: int,
    bias: Tensor | None = None,
    chosen: Choice | None = None,
) -> Tensor:
    """silu(g) u [M, rows / 2] for g and u that take turns in the rows of x W^T (+ bias).

    In one kernel, where K is not parted. x [M, K] is on a GPU; see `multiply` for the rest.
    """
    inputs = x.contiguous()
    chosen = _settled(inputs, weight, rows, chosen)
    if chosen.tile is not None and chosen.splits == 1:
        y = inputs.new_empty(len(inputs), rows // 2)
        _launch(inputs, weight, (bias, None), y, chosen, halved=True)
        return y
    if bias is None:
        both = multiply_in_parts(inputs, weight, rows, chosen)
    else:
        both = multiply(inputs, weight, rows, bias, chosen=chosen)
    return gated(both, x.dtype, GATE_RUN)


def gate_order(size: int) -> Tensor:
    """Rows [gate, up], each `size` of them, a multiple of GATE_RUN, in turns: int64 [2 size]."""
    return torch.arange(2 * size).view(2, -1, GATE_RUN).transpose(0, 1).flatten()


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
    """`multiply` by the parts of a weight in fragment order, whose metadata is empty if dense."""
    dtype, dense = None if group else x.dtype, meta.shape[-1] == 0
    weight = FragmentWeight((rows, x.shape[-1]), values, meta, scales, group, dtype, dense)
    return multiply(x, weight, rows, bias, residual)


@sparse_linear.register_fake
def _(x, values, meta, scales, bias, residual, rows, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


def _on_cpu(
    x: Tensor, weight: FragmentWeight, rows: int, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    dense = unpack(weight, x.dtype)[:rows, : x.shape[-1]]
    y = x.float() @ dense.float().T
    y = y if bias is None else y + bias.float()
    return (y if residual is None else y + residual.float()).to(x.dtype)


def product_of(inputs: Tensor, weight: FragmentWeight, rows: int) -> Product:
    """What inputs [M, K] and a weight of so many rows make together."""
    (M, K), kind = inputs.shape, KINDS[inputs.dtype]
    return Product(M, rows, 2 * K if weight.dense else K, kind, weight.group, weight.dense)


def _settled(inputs: Tensor, weight: FragmentWeight, rows: int, chosen: Choice | None) -> Choice:
    """What is chosen, or found; K is whole where so many tokens take several launches.

    Their parts would not stand behind each other, and there are programs enough.
    """
    chosen = chosen or choice_on(inputs.device.index, product_of(inputs, weight, rows))
    if chosen.tile is None or fits(len(inputs), chosen.tile.BM):
        return chosen
    return replace(chosen, splits=1)


def _room(inputs: Tensor, rows: int, splits: int) -> Tensor:
    return inputs.new_empty(splits, len(inputs), rows, dtype=torch.float32)


def _launch(
    inputs: Tensor,
    weight: FragmentWeight,
    added: tuple[Tensor | None, Tensor | None],
    y: Tensor,
    chosen: Choice,
    halved: bool = False,
) -> None:
    """Compute y [M, rows], or its parts [splits, M, rows]; `added` are bias and residual.

    Or y [M, rows / 2], what a gate lets through, where it is `halved`.
    """
    K, rows, tile, (bias, residual) = inputs.shape[1], y.shape[-1], chosen.tile, added
    rows = 2 * rows if halved else rows
    assert tile is not None
    variant = Variant(
        tile,
        KINDS[inputs.dtype],
        weight.group,
        whole_k=(2 * K if weight.dense else K) % WHOLE_COLUMNS == 0,
        splits=chosen.splits > 1,
        bias=bias is not None,
        residual=residual is not None,
        dense=weight.dense,
        gated=halved,
    )
    blocks = weight.blocks[1]
    for some in pieces(len(inputs), tile.BM):
        x, out = inputs[some], y[..., some, :]
        grid = (triton.cdiv(rows, tile.BN), triton.cdiv(len(x), tile.BM), chosen.splits)
        sparse_gemm[grid](
            x.view(torch.int32),
            weight.values,
            weight.meta,
            weight.meta if weight.scales is None else weight.scales,
            out if bias is None else bias,
            out if residual is None else residual[some],
            out,
            len(x),
            rows,
            K,
            blocks,
            triton.cdiv(blocks // tile.WK, chosen.splits),
            V=variant,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
