"""Linears on a GPU, as operators of torch, so that CUDA graphs and torch.compile take them.

`sparse_linear` computes on CPU tensors too, slowly: by the dense matrix that it stands for. The
others run on a CPU where Triton interprets.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from .expand_gemm import expand_gemm
from .fragments import WHOLE_COLUMNS, unpack
from .int4_gemm import int4_gemm
from .reduce import add_parts
from .sparse_gemm import sparse_gemm
from .targets import ARCHITECTURES, Architecture
from .variants import Product, Variant, choose

KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}
ROWS_MULTIPLE = 16  # results are written 16 bytes at a time, wherever rows begin
COLUMNS_MULTIPLE = 16  # and tokens read so
_REDUCED = 1024  # results of a program that adds parts
_PLAIN = {"BN": 64, "BM": 16, "BK": 128}


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
    found = limits_of(x.device.index)
    if found is None:
        raise NotImplementedError("this GPU has no sparse tensor cores that are known here")
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    M, K = inputs.shape
    y = inputs.new_empty(M, rows)
    product = Product(M, rows, K, KINDS[x.dtype], group)
    chosen = choose(product, *found)
    tile, splits = chosen.tile, chosen.splits
    fused = splits == 1  # else bias and residual are added with the parts
    variant = Variant(
        tile,
        product.kind,
        group,
        whole_k=K % WHOLE_COLUMNS == 0,
        splits=not fused,
        bias=fused and bias is not None,
        residual=fused and residual is not None,
    )
    parts = y if fused else inputs.new_empty(splits, M, rows, dtype=torch.float32)
    blocks = meta.shape[1]
    steps = triton.cdiv(blocks // tile.WK, splits)
    grid = (triton.cdiv(rows, tile.BN), triton.cdiv(M, tile.BM), splits)
    sparse_gemm[grid](
        inputs.view(torch.int32),
        values,
        meta,
        meta if scales is None else scales,
        y if bias is None else bias,
        y if residual is None else residual,
        parts,
        M,
        rows,
        K,
        blocks,
        steps,
        V=variant,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    if not fused:
        _add(parts, bias, residual, y)
    return y.view(*x.shape[:-1], rows)


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


def _add(parts: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    add_parts[(triton.cdiv(y.numel(), _REDUCED),)](
        parts,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        y.shape[1],
        y.numel(),
        splits=len(parts),
        B=_REDUCED,
        biased=bias is not None,
        added=residual is not None,
    )


@torch.library.custom_op("halfweave::expanded_linear", mutates_args=())
def expanded_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """y [..., N] = x W^T (+ bias) for a 2:4 weight as it is stored; `group` 0 if it has floats."""
    inputs, y = _inputs_and_results(x, values.shape[0])
    M, K = inputs.shape
    expand_gemm[_grid(M, values.shape[0])](
        inputs,
        values,
        meta,
        meta if scale is None else scale,
        y if bias is None else bias,
        y,
        M,
        values.shape[0],
        K,
        **_PLAIN,
        group=group,
        biased=bias is not None,
    )
    return y.view(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("halfweave::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    """y [..., N] = x W^T (+ bias) for a dense weight of 4 bits as it is stored."""
    inputs, y = _inputs_and_results(x, values.shape[0])
    M, K = inputs.shape
    int4_gemm[_grid(M, values.shape[0])](
        inputs,
        values,
        scale,
        y if bias is None else bias,
        y,
        M,
        values.shape[0],
        K,
        **_PLAIN,
        group=group,
        biased=bias is not None,
    )
    return y.view(*x.shape[:-1], values.shape[0])


def _inputs_and_results(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    return inputs, inputs.new_empty(len(inputs), rows)


def _grid(M: int, N: int) -> tuple[int, int]:
    return triton.cdiv(N, _PLAIN["BN"]), triton.cdiv(M, _PLAIN["BM"])


@sparse_linear.register_fake
def _(x, values, meta, scales, bias, residual, rows, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


@expanded_linear.register_fake
def _(x, values, meta, scale, bias, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], values.shape[0])


@int4_linear.register_fake
def _(x, values, scale, bias, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], values.shape[0])
