"""Statistics of experts that few calibration tokens were sent to.

Fewer tokens than inputs leave a Hessian singular, and a method would trust what is an accident of a
few of them. Such a Hessian is shrunk towards one that stands for what the expert may yet see, the
more the fewer tokens there are; the way of Ledoit and Wolf (2004), with a weight that needs no
estimate: the share of the tokens that are missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .methods.base import InputStatistics


def is_starved(statistics: InputStatistics) -> bool:
    """Whether there are fewer tokens than inputs."""
    return statistics.tokens < len(statistics.hessian)


def shrunk(statistics: InputStatistics, layer: InputStatistics | None) -> InputStatistics:
    """The statistics of a starved linear, leaning on those of all tokens of its layer.

    `layer` is of the same inputs [K]; None where other tokens have no such inputs, as with what an
    expert computes itself: then all inputs are taken to be equally loud, and to be independent.
    """
    known = statistics.tokens / len(statistics.hessian)
    towards = _alike(statistics.hessian) if layer is None else layer.hessian
    hessian = known * statistics.hessian + (1 - known) * towards
    return InputStatistics(
        hessian, statistics.tokens, sample=statistics.sample, wide=statistics.wide
    )


def _alike(hessian: Tensor) -> Tensor:
    mean = hessian.diagonal().mean()
    # Of no token nothing is known, and no method depends on the Hessian's scale.
    loudness = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.eye(len(hessian), device=hessian.device) * loudness
