"""What follows the last block: the final norm and the scores, with their loss and its gradient.

Scores of a few rows at a time, since a vocabulary is wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..source import Source
from ..stream import skeleton

_ROWS = 128  # positions whose scores are held at a time


class Head:
    """The final norm and the output matrix of `source`, in fp32, on its device."""

    def __init__(self, source: Source) -> None:
        """Read both.

        Raises:
            CheckpointError: a tensor is missing.
        """
        inner = source.family.blocks.partition(".")[0]
        device = source.device
        self._norm = skeleton(source).get_submodule(f"{inner}.norm")
        weight = source.tensors.read(f"{inner}.norm.weight").to(device).float()
        self._norm.load_state_dict({"weight": weight}, strict=True, assign=True)
        self._norm.requires_grad_(False)
        tied = bool(source.config.get("tie_word_embeddings"))
        name = f"{source.family.embedding}.weight" if tied else "lm_head.weight"
        self._weight = source.tensors.read(name).to(device).float()

    @torch.no_grad()
    def loss(self, hidden: Tensor, tokens: Tensor) -> float:
        """Summed negative log-likelihood of a window's tokens but the first.

        `hidden` [length, hidden] leaves the last block; `tokens` int64 [length].
        """
        normed, total = self._norm(hidden[:-1]), 0.0
        for rows, targets in zip(normed.split(_ROWS), tokens[1:].split(_ROWS), strict=True):
            scores = rows @ self._weight.T
            picked = scores.gather(1, targets[:, None])[:, 0]
            total += float((scores.logsumexp(1) - picked).sum(dtype=torch.float64))
        return total

    def sampled_gradient(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient [length, hidden] of the summed loss at labels drawn from the model itself.

        `generator` is on the device.
        """
        entering = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            normed = self._norm(entering)
        pieces = []
        for rows in normed.detach().split(_ROWS):
            error = (rows @ self._weight.T).softmax(dim=1)
            labels = torch.multinomial(error, 1, generator=generator)
            error.scatter_add_(1, labels, error.new_full(labels.shape, -1.0))
            pieces.append(error @ self._weight)
        (gradient,) = torch.autograd.grad(normed, entering, torch.cat(pieces))
        return gradient
