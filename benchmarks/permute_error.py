"""What reordering the inputs of down_proj gains: layer errors with and without, per method.

    python benchmarks/permute_error.py --model MODEL --text TEXT --blocks 5 14 25

The inputs of down_proj may come in any order for nothing (gate's and up's rows follow), and so may
those of o_proj within a head. RIA (Zhang et al., ICLR 2024) deals the channels, sorted by
importance, round robin into the groups of four, and then lets the members of one slot change
groups where more importance survives (a linear assignment; here pairwise exchanges until none
gains). Prints held-out errors as multiples of the same method's without reordering.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from halfweave.pruner.methods import METHODS, InputStatistics, Target
from halfweave.pruner.methods.base import relative_error
from halfweave.pruner.recipe import Pattern
from halfweave.runtime.eval import read_text
from layer_inputs import Layer, real_layers
from torch import Tensor

TARGET = Target(pattern=Pattern.parse("2:4"), bits=16, group=64, damping=0.01)
_SWEEPS = 3


def importance(layer: Layer) -> Tensor:
    """RIA's score [N, K]: a weight's share of its row and of its column, times its input's norm."""
    size = layer.weight.abs()
    relative = size / size.sum(1, keepdim=True) + size / size.sum(0, keepdim=True)
    return relative * layer.fit.hessian.diagonal().clamp_min(0) ** 0.25


def dealt(score: Tensor) -> Tensor:
    """Channels sorted by importance, dealt round robin: slot s of group g has rank s * K/4 + g."""
    ranked = score.sum(0).argsort(descending=True)
    return ranked.view(4, -1).T.flatten()


def exchanged(score: Tensor, order: Tensor) -> Tensor:
    """`order` after pairwise exchanges of equal slots between groups, each where more survives."""
    groups = order.view(-1, 4).clone()
    for _ in range(_SWEEPS):
        for slot in range(4):
            _exchange(score, groups, slot)
    return groups.flatten()


def _exchange(score: Tensor, groups: Tensor, slot: int) -> None:
    """Let the members of one slot change groups; gains [i, j]: member i placed into group j."""
    others = [other for other in range(4) if other != slot]
    first, second = score[:, groups[:, others]].sort(-1, descending=True).values[..., :2].unbind(-1)
    member = score[:, groups[:, slot]]
    gains = torch.stack(
        [torch.maximum(member[:, i : i + 1], second).add_(first).sum(0) for i in range(len(groups))]
    )
    at = torch.arange(len(groups))
    while True:
        now = gains[at, torch.arange(len(groups))]
        better = gains[at] + gains[at].T - now[:, None] - now[None]
        best = int(better.argmax())
        i, j = divmod(best, len(groups))
        if float(better[i, j]) <= 1e-6 * float(now.sum()):
            break
        at[[i, j]] = at[[j, i]]
    groups[:, slot] = groups[at, slot]


def reordered(layer: Layer, order: Tensor) -> Layer:
    def moved(inputs: InputStatistics) -> InputStatistics:
        return InputStatistics(inputs.hessian[order][:, order].contiguous(), inputs.tokens)

    weight = layer.weight[:, order].contiguous()
    return Layer(layer.name, weight, moved(layer.fit), moved(layer.held_out))


def error(layer: Layer, method: str) -> float:
    pruned = METHODS[method](layer.weight.clone(), layer.fit, TARGET)
    return relative_error(layer.weight, pruned.weight, layer.held_out.hessian)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "admm"])
    options = parser.parse_args()
    layers = real_layers(options.model, read_text(options.text), options.blocks, 64, 512)
    for layer in layers:
        if not layer.name.endswith("down_proj"):
            continue
        score = importance(layer)
        orders = {"dealt": dealt(score)}
        orders["exchanged"] = exchanged(score, orders["dealt"])
        generator = torch.Generator().manual_seed(0)
        orders["random"] = torch.randperm(score.shape[1], generator=generator)
        for method in options.methods:
            plain = error(layer, method)
            ratios = [
                f"{name} {error(reordered(layer, order), method) / plain:.3f}"
                for name, order in orders.items()
            ]
            print(f"{layer.name} {method} {plain:.5f}: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
