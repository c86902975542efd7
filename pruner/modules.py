"""Transformers' modules as the pruner wants them: every prunable linear a module of its own.

Its parameters have the names that weights are stored under, and a weight is [N, K] of whatever
dtype it is given. What a block computes stays the same. Works on modules without memory (meta),
before any weight is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .family import Experts, Family
from .rows import StoredLinear


def adapt(block: nn.Module, family: Family) -> None:
    """Change a block of transformers' in place."""
    if family.experts is not None:
        mlp: Any = block.get_submodule("mlp")
        mlp.experts = ListedExperts(mlp.experts, family.experts)
    if family.stored_mlp != "mlp":
        # Registered under the stored name alone; the forward pass goes on to find it as `mlp`.
        mlp = block._modules.pop("mlp")
        block.add_module(family.stored_mlp, mlp)
        block.__dict__["mlp"] = mlp
    for name in family.linears:
        if not family.is_routed(name):
            _replace(block, name)


def _replace(block: nn.Module, name: str) -> None:
    """Put a `StoredLinear` in the place of a linear, or of GPT-2's, whose weight is [K, N]."""
    old: Any = block.get_submodule(name)
    rows, columns = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, _linear(columns, rows, old.bias is not None))


def _linear(columns: int, rows: int, bias: bool = False) -> StoredLinear:
    with torch.device("meta"):
        return StoredLinear(columns, rows, bias)


class ListedExperts(nn.Module):
    """Experts as MLPs of three linears each, where transformers stacks the weights of all.

    Every expert is called, with no token where none chose it: who watches its linears learns that.
    """

    def __init__(self, stacked: Any, experts: Experts) -> None:
        """`stacked` is transformers' module."""
        super().__init__()
        hidden, middle = stacked.hidden_dim, stacked.intermediate_dim
        for index in range(experts.count):
            linears = {
                experts.gate: _linear(hidden, middle),
                experts.up: _linear(hidden, middle),
                experts.down: _linear(middle, hidden),
            }
            self.add_module(str(index), nn.ModuleDict(linears))
        self._experts, self.activation = experts, stacked.act_fn

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Of `hidden` [tokens, H], `chosen` experts [tokens, k] and their `weights` [tokens, k]."""
        names, total = self._experts, torch.zeros_like(hidden)
        for index in range(names.count):
            linears: Any = self.get_submodule(str(index))
            token, place = torch.where(chosen == index)
            x = hidden[token]
            y = self.activation(linears[names.gate](x)) * linears[names.up](x)
            y = linears[names.down](y) * weights[token, place, None]
            total.index_add_(0, token, y)
        return total
