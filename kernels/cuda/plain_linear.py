"""Linears by plain Triton, as operators of torch; they run on a CPU where Triton interprets."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional

from .dense import TRITON_KINDS, dense_of_int4
from .expand_gemm import expand_gemm
from .int4_gemm import int4_gemm
from .launch import on_its_device, pieces
from .steps import add_up

_EXPANDED = {"BN": 64, "BM": 16, "BK": 128}
_ROWS = 64  # of a program of codes
_DENSE_FROM = 128  # tokens from which on a dense product is faster, writing it out included
_PROGRAMS_WANTED, _LEAST_GROUPS, _MOST_SPLITS = 4, 4, 8  # for every multiprocessor; of a split


@torch.library.custom_op("halfweave::expanded_linear", mutates_args=())
@on_its_device
def expanded_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    group: int,
) -> Tensor:
    """y [..., N] = x W^T (+ bias) for a 2:4 weight as it is stored; `group` 0 if it has floats."""
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    (M, K), rows = inputs.shape, values.shape[0]
    y = inputs.new_empty(M, rows)
    for some in pieces(M, _EXPANDED["BM"]):
        part, out = inputs[some], y[some]
        grid = triton.cdiv(rows, _EXPANDED["BN"]), triton.cdiv(len(part), _EXPANDED["BM"])
        expand_gemm[grid](
            part,
            values,
            meta,
            meta if scale is None else scale,
            y if bias is None else bias,
            out,
            len(part),
            rows,
            K,
            **_EXPANDED,
            group=group,
            biased=bias is not None,
        )
    return y.view(*x.shape[:-1], rows)


@torch.library.custom_op("halfweave::int4_linear", mutates_args=())
@on_its_device
def int4_linear(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, group: int
) -> Tensor:
    """y [..., N] = x W^T (+ bias) for a dense weight of 4 bits as it is stored."""
    inputs = x.reshape(-1, x.shape[-1]).contiguous()
    if x.is_cuda and len(inputs) >= _DENSE_FROM:
        return functional.linear(x, dense_of_int4(values, scale, group, x.dtype), bias)
    (M, K), rows = inputs.shape, values.shape[0]  # on a GPU too few tokens for several grids
    tokens = 16 if M <= 16 else 32
    groups = scale.shape[1]
    programs = triton.cdiv(rows, _ROWS) * triton.cdiv(M, tokens)
    splits = _splits(programs, groups, x.device)
    y = inputs.new_empty(M, rows)
    parts = y if splits == 1 else y.new_empty(splits, M, rows, dtype=torch.float32)
    int4_gemm[(triton.cdiv(rows, _ROWS), triton.cdiv(M, tokens), splits)](
        inputs.view(torch.int32),
        values,
        scale,
        y if bias is None else bias,
        parts,
        M,
        rows,
        K,
        triton.cdiv(groups, splits),
        BN=_ROWS,
        BM=tokens,
        group=group,
        kind=TRITON_KINDS[x.dtype],
        biased=splits == 1 and bias is not None,
        num_stages=4,
    )
    if splits > 1:
        add_up(parts, bias, None, y)
    return y.view(*x.shape[:-1], rows)


def _splits(programs: int, groups: int, device: torch.device) -> int:
    """Parts of K, until every multiprocessor has some programs; one where Triton interprets."""
    if device.type != "cuda":
        return 1
    wanted = _PROGRAMS_WANTED * torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while (
        2 * splits * programs <= wanted
        and 2 * splits * _LEAST_GROUPS <= groups
        and splits < _MOST_SPLITS
    ):
        splits *= 2
    return splits


@expanded_linear.register_fake
def _(x, values, meta, scale, bias, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], values.shape[0])


@int4_linear.register_fake
def _(x, values, scale, bias, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], values.shape[0])
