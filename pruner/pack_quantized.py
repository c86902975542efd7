"""Codes as the compressed-tensors package stores them: its `pack-quantized` format.

Symmetric integers, one scale per row and group of columns or per row. A word of 32 bits holds
32 / bits neighbours of a row, the first in its lowest bits, each with half of its range added. The
pruned places of a 2:4 weight are codes of 0: the format has no sparsity, and nothing is saved.
(compressed-tensors 0.20, `compressors/pack_quantized`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import nibbles
from ..kernels.formats import Int4, Int8, PackedLinear, Sparse24Int4

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True, order=True)
class Scheme:
    """Bits of a code, and columns that share a scale; 0 where a row has one."""

    bits: int
    group: int

    @classmethod
    def of(cls, weight: PackedLinear) -> Scheme | None:
        """How a weight is stored there; None where it has to stay dense.

        That is for floats, and for a last group that is shorter than the others.
        """
        if isinstance(weight, Int8):
            return cls(8, 0)
        if isinstance(weight, Int4 | Sparse24Int4) and weight.shape[1] % weight.group == 0:
            return cls(4, weight.group)
        return None

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """An entry of `config_groups`."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.group else "channel",
            "dynamic": False,
        }
        if self.group:
            weights["group_size"] = self.group
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }


def tensors_of(weight: PackedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors by suffix, of a weight that has a `Scheme`; scales become `dtype`."""
    codes, scale, bits = _codes(weight)
    return {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }


def quantization_config(linears: Mapping[str, Scheme], dense: list[str]) -> dict[str, Any]:
    """The block of config.json. `dense` names linears that are stored as they are."""
    groups = {}
    for number, scheme in enumerate(sorted(set(linears.values()))):
        names = [name for name, own in linears.items() if own == scheme]
        groups[f"group_{number}"] = scheme.to_json(names)
    if len(groups) == 1:
        groups["group_0"]["targets"] = ["Linear"]  # what others' loaders are used to
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] of -2^(bits-1) and on to int32 [N, ceil(K bits / 32)]; bits divide 32."""
    each = 32 // bits
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    padded = functional.pad(unsigned, (0, -codes.shape[1] % each))
    words = padded.view(len(codes), -1, each) << (bits * torch.arange(each))
    # Summed in 64 bits: the highest code reaches into the sign of 32.
    return words.sum(-1).to(torch.uint32).view(torch.int32)


def _codes(weight: PackedLinear) -> tuple[Tensor, Tensor, int]:
    """Codes [N, K] with zeros filled in, scales, and bits."""
    if isinstance(weight, Int8):
        return weight.values, weight.scale, 8
    assert isinstance(weight, Int4 | Sparse24Int4)
    kept = nibbles.unpack_nibbles(weight.values).to(torch.int8) - 8
    if isinstance(weight, Sparse24Int4):
        kept = nibbles.scatter_kept(kept, nibbles.unpack_meta(weight.meta, weight.shape[1]))
    return kept, weight.scale, 4
