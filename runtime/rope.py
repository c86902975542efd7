"""Rotary position tables: the cosine and sine of every position, and turning a vector by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position for each pair of dimensions: fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
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
    """Cosines and sines for positions [count]: fp32 [count, head_dim]."""
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn x [heads, tokens, head_dim]; dimension d pairs with d + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    turned: Tensor = x * cosine + torch.cat((-second, first), dim=-1) * sine
    return turned
