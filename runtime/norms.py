"""Norms of hidden states, and of the vectors of heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Norm:
    """LayerNorm where there is a bias, else RMSNorm; gain and bias are [size].

    With a gain of more precision than `x` the whole is computed in that, and rounded at the end.
    """

    gain: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [..., size]."""
        if self.bias is not None:
            return functional.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)
        exact = x.to(self.gain.dtype)
        return functional.rms_norm(exact, self.gain.shape, self.gain, self.eps).to(x.dtype)
