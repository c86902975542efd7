"""Free reordering inside a block: some channels may come in any order, and N:M cares which.

The channels between an MLP's two halves are named by nobody outside it: their order changes no
output as long as the rows of what makes them and the columns of what reads them change alike. So
the order under which the reader's pattern costs least is free, in bytes and in time.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kernels.formats import PackedLinear, with_rows
from .family import FreeChannels
from .masks import is_n_of_m
from .methods.base import InputStatistics, Pruned, Target
from .solvers.objective import IndefiniteError
from .solvers.reorder import find_order, saliency


def order_for(weight: Tensor, fit: InputStatistics, target: Target) -> Tensor | None:
    """The best order of a reader's inputs, int64 [K]; None where no order is better.

    That is where the pattern has no groups, or where fp32 `weight` [N, K] obeys it already: its
    zeros stand in groups. Where the inputs are of no use, none is known to be.
    """
    pattern = target.pattern
    if not pattern.of or is_n_of_m(weight, pattern.kept, pattern.of):
        return None
    try:
        curvature = fit.curvature(target.damping)
    except IndefiniteError:
        return None
    return find_order(saliency(weight, curvature), pattern)


def reorder_weights(
    weights: MutableMapping[str, Tensor], channels: FreeChannels, order: Tensor, prefix: str = ""
) -> None:
    """Put a block's tensors into the new order; `prefix` stands before their short names."""
    for maker in channels.makers:
        for suffix in ("weight", "bias"):
            name = f"{prefix}{maker}.{suffix}"
            if name in weights:
                weights[name] = weights[name][_rows(order, len(weights[name]))]
    reader = f"{prefix}{channels.reader}.weight"
    weights[reader] = weights[reader][:, order].contiguous()


def reorder_module(block: nn.Module, channels: FreeChannels, order: Tensor) -> None:
    """Put the block's parameters into the new order, in place."""
    parameters = dict(block.named_parameters())
    weights = {name: parameter.data for name, parameter in parameters.items()}
    reorder_weights(weights, channels, order)
    for name, parameter in parameters.items():
        if weights[name] is not parameter.data:
            parameter.data = weights[name]


def reordered_rows(packed: PackedLinear, order: Tensor) -> PackedLinear:
    """A maker as stored."""
    return with_rows(packed, _rows(order, packed.shape[0]))


def reordered_solution(pruned: Pruned, order: Tensor) -> Pruned:
    """A maker's solution."""
    rows = _rows(order, len(pruned.weight))
    codes = None if pruned.codes is None else pruned.codes[rows]
    scale = None if pruned.scale is None else pruned.scale[rows]
    return replace(
        pruned, weight=pruned.weight[rows], keep=pruned.keep[rows], codes=codes, scale=scale
    )


def _rows(order: Tensor, count: int) -> Tensor:
    """The order of a maker's rows: of each of the linears that are fused in it."""
    channels = len(order)
    starts = torch.arange(0, count, channels, device=order.device)
    return (starts[:, None] + order).flatten()
