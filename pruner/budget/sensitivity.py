"""How much each output of each linear matters to the model's loss: one backward pass.

For a small change dy of a linear's outputs, the model's distance from itself grows by 1/2 dy^T F dy
with F the Fisher matrix. Of F only the diagonal is kept, E[g_n^2] with g the loss's gradient, as in
Optimal Brain Damage and HAWQ-V2 (Dong et al., 1911.03852). Labels are drawn from the model's own
prediction: their gradients are the true Fisher's, uncorrelated between positions, while those at
the text's tokens add what the model has not learned, which no compression changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..source import Source
from ..stream import BlockStream
from .head import Head


def output_sensitivity(
    source: Source, windows: Tensor, seed: int, told: Callable[[int], None] = lambda _: None
) -> dict[str, Tensor]:
    """E[g_n^2] fp32 [N] of every prunable linear by full name, g summed over a window's loss.

    `windows` int64 [n, length]. Holds one block, and the inputs of all blocks; no other activation
    outlives its window. `told` is given the number of finished blocks.
    """
    stream = BlockStream(source, windows)
    entering = []
    for index in range(source.block_count):
        entering.append(stream.hidden.clone())
        stream.advance(stream.load_block(index, source.block_tensors(index)))
        stream.drop_block(index)
    head, generator = Head(source), torch.Generator(source.device).manual_seed(seed)
    gradient = torch.stack([head.sampled_gradient(one, generator) for one in stream.hidden])
    found: dict[str, Tensor] = {}
    for index in reversed(range(source.block_count)):
        block = stream.load_block(index, source.block_tensors(index))
        squares = _Squares(block, source.family.linears)
        hidden = entering.pop()
        for i in range(len(windows)):
            gradient[i : i + 1] = _through(
                lambda x, block=block: stream.run(block, x),  # type: ignore[misc]
                hidden[i : i + 1],
                gradient[i : i + 1],
            )
        squares.remove()
        prefix = source.family.block_prefix(index)
        found.update({prefix + name: s / windows.numel() for name, s in squares.sums.items()})
        stream.drop_block(index)
        told(source.block_count - index)
    return found


def predicted_loss(change: Tensor, hessian: Tensor, sensitivity: Tensor) -> float:
    """Expected increase of the loss per token, in nats, when a weight [N, K] changes by `change`.

    1/2 sum_n E[g_n^2] dW_n H dW_n^T, with H [K, K] the mean of x x^T over tokens. Takes errors to
    be small and independent; compare with it, and measure what it says.
    """
    per_row = ((change @ hessian) * change).sum(dim=1).clamp_min(0)
    return float(0.5 * (per_row.double() * sensitivity.to(per_row).double()).sum())


def _through(run: Callable[[Tensor], Tensor], entering: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of what enters from that of what leaves, both [1, length, hidden]."""
    entering = entering.detach().requires_grad_(True)
    with torch.enable_grad():
        leaving = run(entering)
    (found,) = torch.autograd.grad(leaving, entering, gradient)
    return found


class _Squares:
    """Sums the squared gradient of each linear's output over all positions."""

    def __init__(self, block: nn.Module, names: tuple[str, ...]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._handles = []
        for name in names:
            linear = block.get_submodule(name)
            weight = block.get_parameter(f"{name}.weight")
            self.sums[name] = weight.new_zeros(len(weight), dtype=torch.float32)
            self._handles.append(linear.register_forward_hook(self._watch(name)))

    def _watch(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            self.sums[name] += gradient.float().square().flatten(0, -2).sum(dim=0)

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)

        return watch

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
