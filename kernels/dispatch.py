"""Which kernel serves which format on which device: one table, printable, without hidden rules.

On a CPU the C++ kernels multiply by the packed form, and round inputs to 8 bits where that has
codes. On a GPU, in 16 bits, sparse tensor cores multiply by 2:4 weights, and a Triton kernel by
dense ones of 4 bits. Where a kernel is not installed, or exact results are asked for, a weight is
expanded to a dense matrix when it is loaded, and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from .cpu.library import Library, library
from .cpu.packed import CODED, linear, pack_weight
from .formats import FORMATS, Int4, PackedLinear, Sparse24, Sparse24Int4

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


def _packed(library: Library, kind: str) -> Kernel:
    def make(
        weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> LinearFunction:
        packed = pack_weight(library, weight)

        def apply(x: Tensor) -> Tensor:
            return linear(library, packed, x, bias).to(dtype)

        return apply

    why = "multiplied as packed, inputs in 8 bits" if kind in CODED else "multiplied as packed"
    return Kernel(f"cpu-{library.level}", why, make)


def on_gpu(
    weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    """As `prepare` on a GPU; on CPU tensors too, where Triton interprets."""
    from .cuda import binding

    if not binding.has_kernel(weight, dtype):
        return _expand_once(weight, bias, device, dtype)
    return binding.bind(weight, bias, device, dtype)


_EXPAND = Kernel("torch-dense", "expanded to dense at load, torch linear", _expand_once)
_GPU = Kernel("cuda", "multiplied as packed, by Triton's kernels, in 16 bits", on_gpu)
_GPU_KINDS = (Sparse24.kind, Sparse24Int4.kind, Int4.kind)
_TABLE = {(kind, device): _EXPAND for kind in FORMATS for device in ("cpu", "cuda")}


def choose(kind: str, device_type: str, exact: bool = False) -> Kernel:
    """The kernel for a format on a kind of device; `exact` wants what rounds nothing.

    Raises:
        UnsupportedModel: there is none.
    """
    if device_type == "cpu" and kind in FORMATS and not exact:
        native = library()
        if native is not None:
            return _packed(native, kind)
    if device_type == "cuda" and kind in _GPU_KINDS and not exact and find_spec("triton"):
        return _GPU
    kernel = _TABLE.get((kind, device_type))
    if kernel is None:
        raise UnsupportedModel(f"no kernel for format {kind} on {device_type}")
    return kernel


def prepare(
    weight: PackedLinear,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    exact: bool = False,
) -> LinearFunction:
    """Bind a weight [N, K] and bias [N] to the chosen kernel.

    Returns a function from x [..., K] to [..., N], both of `dtype` on `device`.
    """
    return choose(weight.kind, device.type, exact).make(weight, bias, device, dtype)
