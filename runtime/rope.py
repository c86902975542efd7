"""Rotary position tables: the cosine and sine of every position, and turning a vector by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position for each pair of the dimensions that are turned: fp32 [dims / 2]."""
    dims = rope.dims(head_dim)
    exponents = torch.arange(0, dims, 2, dtype=torch.float32) / dims
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by `factor`, blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_positions / wavelengths
    width = rope.high_freq_factor - rope.low_freq_factor
    share = ((turns - rope.low_freq_factor) / width).clamp(0, 1)
    return (1 - share) * frequencies / rope.factor + share * frequencies


def rotation(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [count]: fp32 [count, dims]."""
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the first `dims` of x [heads, tokens, head_dim]; d pairs with d + dims / 2."""
    dims = cosine.shape[-1]
    first, second, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    turned = x[..., :dims] * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1)
