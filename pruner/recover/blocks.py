"""Gradient tuning of one pruned block against the block it was, on cached activations.

The pruned block reads what the pruned model feeds it and learns to give what the dense block gives
on the dense model's activations, so that it also mends what earlier blocks lost (cf. EBFT, Guo et
al., 2402.12419). Masks stay; a block whose held-out windows do not improve is put back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class BlockTuning:
    """How a block is tuned: a step reads `batch` windows.

    `learning_rate` is Adam's, in units of the root mean square of each parameter's kept entries.
    """

    epochs: int
    seed: int
    learning_rate: float = 4e-3
    batch: int = 1


@dataclass(frozen=True)
class Activations:
    """Windows [n, length, hidden]: inputs of the pruned block, and the outputs it should give.

    The last `held_out` windows only judge.
    """

    inputs: Tensor
    targets: Tensor
    held_out: int


@dataclass(frozen=True)
class TuningResult:
    """Relative squared error of the block's output on held-out windows."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the tuned weights are in the block; if not, it is as it was."""
        return self.after < self.before


def tune_block(
    block: nn.Module,
    masks: Mapping[str, Tensor],
    activations: Activations,
    forward: Forward,
    tuning: BlockTuning,
    fixed: Collection[str] = (),
) -> TuningResult:
    """Train all parameters of `block` but the `fixed` ones in place, on their masks.

    `masks` maps parameter names to bool tensors of their shape. Some windows must be held out.
    Deterministic for one thread count.
    """
    assert activations.held_out > 0, "nothing to judge the tuning by"
    for parameter in block.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    untouched = copy.deepcopy(block.state_dict())
    parameters = {n: p for n, p in block.named_parameters() if n not in fixed}
    fitted = len(activations.inputs) - activations.held_out
    before = _error(block, activations, forward, tuning.batch)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    groups = [
        {"params": [parameter], "lr": tuning.learning_rate * _size(parameter, masks.get(name))}
        for name, parameter in parameters.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), foreach=True)
    generator = torch.Generator().manual_seed(tuning.seed)
    steps = tuning.epochs * math.ceil(fitted / tuning.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    scale = _signal(activations)
    with torch.enable_grad():
        for _ in range(tuning.epochs):
            for chosen in torch.randperm(fitted, generator=generator, device="cpu").split(
                tuning.batch
            ):
                output = forward(block, activations.inputs[chosen])
                loss = (output - activations.targets[chosen]).square().mean() / scale
                loss.backward()
                for name, mask in masks.items():
                    gradient = parameters[name].grad
                    assert gradient is not None
                    gradient.mul_(mask)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    block.requires_grad_(False)
    result = TuningResult(before, _error(block, activations, forward, tuning.batch))
    if not result.kept:
        block.load_state_dict(untouched)
    return result


def _signal(activations: Activations) -> float:
    """Mean square of what the block adds to its input, a window at a time: they may be in files."""
    pairs = zip(activations.inputs, activations.targets, strict=True)
    total = sum(float((target - entering).square().sum()) for entering, target in pairs)
    return total / activations.targets.numel()


@torch.no_grad()
def _error(block: nn.Module, activations: Activations, forward: Forward, batch: int) -> float:
    """Squared error over what the block adds to its input, on the held-out windows."""
    start = len(activations.inputs) - activations.held_out
    lost = whole = 0.0
    for at in range(start, len(activations.inputs), batch):
        here = slice(at, at + batch)
        inputs, targets = activations.inputs[here], activations.targets[here]
        lost += float((forward(block, inputs) - targets).square().sum())
        whole += float((targets - inputs).square().sum())
    return lost / whole if whole > 0 else 0.0


def _size(parameter: Tensor, mask: Tensor | None) -> float:
    """Root mean square of the entries that may move."""
    kept = parameter.detach() if mask is None else parameter.detach()[mask]
    return float(kept.square().mean().sqrt()) if kept.numel() else 0.0


def _rate(step: int, steps: int) -> float:
    """A short warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / 5)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
