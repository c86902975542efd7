"""Which kernel serves which format on which device: one table, printable, without hidden rules.

At this point every format is expanded to a dense matrix when a model is loaded and multiplied by
torch: right on every machine, but no faster than dense. Kernels that multiply by the packed form
join by adding a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from .formats import FORMATS, PackedLinear

LinearFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One row of the table: a name, the reason it was chosen, and how to bind a weight to it."""

    name: str
    why: str
    make: Callable[[PackedLinear, Tensor | None, torch.device, torch.dtype], LinearFunction]


def _expand_once(
    weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    dense = weight.unpack(dtype).to(device)
    offset = None if bias is None else bias.to(device=device, dtype=dtype)

    def apply(x: Tensor) -> Tensor:
        return functional.linear(x, dense, offset)

    return apply


_EXPAND = Kernel("torch-dense", "expanded to dense at load, torch linear", _expand_once)
_TABLE = {(kind, device): _EXPAND for kind in FORMATS for device in ("cpu", "cuda")}


def choose(kind: str, device_type: str) -> Kernel:
    """The kernel for a format on a kind of device.

    Raises:
        UnsupportedModel: there is none.
    """
    kernel = _TABLE.get((kind, device_type))
    if kernel is None:
        raise UnsupportedModel(f"no kernel for format {kind} on {device_type}")
    return kernel


def prepare(
    weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    """Bind a weight [N, K] and bias [N] to the chosen kernel.

    Returns a function from x [..., K] to [..., N], both of `dtype` on `device`.
    """
    return choose(weight.kind, device.type).make(weight, bias, device, dtype)
