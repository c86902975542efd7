"""Transformers' modules as the pruner wants them: every prunable linear a module of its own.

Its parameters have the names that weights are stored under, and a weight is [N, K]. What a block
computes stays the same. Works on modules without memory (meta), before any weight is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .family import Experts, Family


def adapt(block: nn.Module, family: Family) -> None:
    """Change a block of transformers' in place."""
    if family.transposed:
        _straighten(block)
    if family.experts is not None:
        mlp: Any = block.get_submodule("mlp")
        mlp.experts = ListedExperts(mlp.experts, family.experts)
    if family.stored_mlp != "mlp":
        # Registered under the stored name alone; the forward pass goes on to find it as `mlp`.
        mlp = block._modules.pop("mlp")
        block.add_module(family.stored_mlp, mlp)
        block.__dict__["mlp"] = mlp


def _straighten(block: nn.Module) -> None:
    """Replace GPT-2's Conv1D, a linear that holds its weight as [K, N]."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(block.named_modules()):
        if isinstance(module, Conv1D):
            columns, rows = module.weight.shape
            parent, _, child = name.rpartition(".")
            with torch.device("meta"):
                setattr(block.get_submodule(parent), child, nn.Linear(columns, rows))


class ListedExperts(nn.Module):
    """Experts as MLPs of three linears each, where transformers stacks the weights of all.

    Every expert is called, with no token where none chose it: who watches its linears learns that.
    """

    def __init__(self, stacked: Any, experts: Experts) -> None:
        """`stacked` is transformers' module."""
        super().__init__()
        hidden, middle = stacked.hidden_dim, stacked.intermediate_dim
        for index in range(experts.count):
            with torch.device("meta"):
                linears = {
                    experts.gate: nn.Linear(hidden, middle, bias=False),
                    experts.up: nn.Linear(hidden, middle, bias=False),
                    experts.down: nn.Linear(middle, hidden, bias=False),
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
