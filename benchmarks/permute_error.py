"""What the order of a linear's inputs is worth: layer errors with and without, per method.

    python benchmarks/permute_error.py --model MODEL --text TEXT --blocks 5 14 25

The inputs of down_proj may come in any order for nothing (gate's and up's rows follow), and so may
those of o_proj within a head (v's rows follow), alike in all heads that share a key's. "Found" is
the product's order (pruner/solvers/reorder.py); "dealt" is what it begins with, channels by
importance, round robin into the groups (RIA, Zhang et al., ICLR 2024). Prints held-out errors as
multiples of the same method's without reordering.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from halfweave.files import read_json
from halfweave.pruner.methods import METHODS, InputStatistics, Target
from halfweave.pruner.methods.base import relative_error
from halfweave.pruner.recipe import Pattern
from halfweave.pruner.solvers.reorder import find_order, saliency
from halfweave.runtime.eval import read_text
from layer_inputs import Layer, real_layers
from torch import Tensor

TARGET = Target(pattern=Pattern.parse("2:4"), bits=16, group=64, damping=0.01)
Order = Callable[[Tensor], Tensor]  # of channels, from what their weights are worth [N, channels]


def dealt(worth: Tensor) -> Tensor:
    """Channels sorted by importance, round robin: slot s of group g has rank s * K/4 + g."""
    return worth.sum(0).argsort(descending=True).view(4, -1).T.flatten()


def at_random(worth: Tensor) -> Tensor:
    """Any order."""
    return torch.randperm(worth.shape[1], generator=torch.Generator().manual_seed(0))


def found(worth: Tensor) -> Tensor:
    """The product's."""
    return find_order(worth, TARGET.pattern)


ORDERS: dict[str, Order] = {"dealt": dealt, "found": found, "random": at_random}


def within_heads(worth: Tensor, shape: tuple[int, int, int], order: Order) -> Tensor:
    """An order [K] of o_proj's inputs for heads of `shape`: keys' heads, heads of each, dim."""
    kv_heads, sharing, dim = shape
    blocks = worth.view(len(worth), kv_heads, sharing, dim)
    # All heads that share a value have its channels in one order: each row of each votes.
    own = [order(blocks[:, head].flatten(0, 1)) for head in range(kv_heads)]
    starts = torch.arange(0, worth.shape[1], dim).view(kv_heads, sharing, 1)
    return torch.cat([(starts[head] + own[head]).flatten() for head in range(kv_heads)])


def reordered(layer: Layer, order: Tensor) -> Layer:
    """The same linear with its inputs in another order."""

    def moved(inputs: InputStatistics) -> InputStatistics:
        return InputStatistics(inputs.hessian[order][:, order].contiguous(), inputs.tokens)

    weight = layer.weight[:, order].contiguous()
    return Layer(layer.name, weight, moved(layer.fit), moved(layer.held_out))


def error(layer: Layer, method: str) -> float:
    """Held-out relative error of a method."""
    pruned = METHODS[method](layer.weight.clone(), layer.fit, TARGET)
    return relative_error(layer.weight, pruned.weight, layer.held_out.hessian)


def heads_of(model: Path) -> tuple[int, int, int]:
    """Heads of keys, heads that share each, and their size, of a model of the Llama family."""
    config = read_json(model / "config.json")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    return kv_heads, heads // kv_heads, dim


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "admm"])
    options = parser.parse_args()
    heads = heads_of(options.model)
    layers = real_layers(options.model, read_text(options.text), options.blocks, 64, 512)
    for layer in layers:
        if not layer.name.endswith(("down_proj", "o_proj")):
            continue
        worth = saliency(layer.weight, layer.fit.curvature(TARGET.damping))
        orders = {
            name: within_heads(worth, heads, order) if "o_proj" in layer.name else order(worth)
            for name, order in ORDERS.items()
        }
        for method in options.methods:
            plain = error(layer, method)
            ratios = [
                f"{name} {error(reordered(layer, order), method) / plain:.3f}"
                for name, order in orders.items()
            ]
            print(f"{layer.name} {method} {plain:.5f}: {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
