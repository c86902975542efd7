"""What follows the last block: the final norm and the scores, with their loss and its gradient.

Scores of a few rows at a time, since a vocabulary is wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedModel
from ..family import Family
from ..source import Source
from ..stream import skeleton

_ROWS = 128  # positions whose scores are held at a time


def check_head(family: Family) -> None:
    """Refuse a model whose scores take more than a norm and a matrix, or that has experts.

    Raises:
        UnsupportedModel: for that reason.
    """
    reasons = {
        "it caps its scores": family.capped,
        "it has no last norm": not family.norm,
        "it has experts, and some may see no token": family.experts is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedModel(
            f"a quality budget does not know how to judge this model: {found[0]}",
            "prune it to one format: --pattern and --bits, without a budget",
        )


class Head:
    """The final norm and the output matrix of `source`, in fp32, on its device."""

    def __init__(self, source: Source) -> None:
        """Read both.

        Raises:
            CheckpointError: a tensor is missing.
        """
        family = source.family

        def read(name: str) -> Tensor:
            return source.tensors.read(name).to(source.device).float()

        self._norm = skeleton(source).get_submodule(family.norm)
        state = {
            name: source.tensors.read(f"{family.norm}.{name}") for name in self._norm.state_dict()
        }
        state = {name: tensor.to(source.device).float() for name, tensor in state.items()}
        self._norm.load_state_dict(state, strict=True, assign=True)
        self._norm.requires_grad_(False)
        name = family.embedding if family.tied else family.head
        self._weight = read(f"{name}.weight")

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
