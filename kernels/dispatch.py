"""Which kernel serves which format on which device: one table, printable, without hidden rules.

On a CPU the C++ kernels multiply by the packed form, and round inputs to 8 bits where that has
codes. On a GPU, in 16 bits, sparse tensor cores multiply by 2:4 weights, and a Triton kernel by
dense ones of 4 bits. Where a kernel is not installed, or exact results are asked for, a weight is
expanded to a dense matrix when it is loaded, and multiplied by torch.

On a CPU that is the rule until `halfweave bench MODEL kernel` has measured (measured.py): where it
found a dense product to be faster for so many tokens, `prepare` takes that one there, and holds the
weight in both forms. A decoder of our own in C++ keeps to one form, that for one token, because a
token has to get the same bits whatever is computed beside it; `settled` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from .cpu.library import Library, library
from .cpu.packed import CODED, linear, pack_weight
from .formats import FORMATS, Dense, Int4, PackedLinear, Sparse24, Sparse24Int4
from .measured import SPARSE, Measured, Product, cpu_device, find_table, row_at

_MARGIN = 1.03  # what a dense copy has to win by, since it takes memory

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
GPU_KINDS = (Sparse24.kind, Sparse24Int4.kind, Int4.kind)
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
    if device_type == "cuda" and kind in GPU_KINDS and not exact and find_spec("triton"):
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
    """Bind a weight [N, K] and bias [N] to the chosen kernel, or to several by number of tokens.

    Returns a function from x [..., K] to [..., N], both of `dtype` on `device`.
    """
    kernel = choose(weight.kind, device.type, exact)
    rows = () if exact else measured_rows(Product.of(weight), device.type)
    if any(row.choice != SPARSE for row in rows):
        kernel = _by_tokens(kernel, rows)
    return kernel.make(weight, bias, device, dtype)


def measured_rows(product: Product, device_type: str) -> tuple[Measured, ...]:
    """What was measured of a product on this machine; nothing without a table or the kernels."""
    native = library() if device_type == "cpu" else None
    table = None if native is None else find_table(cpu_device(native))
    return () if table is None else table.rows.get(product, ())


def _by_tokens(packed: Kernel, rows: Sequence[Measured]) -> Kernel:
    """The fastest for each number of tokens; a weight is expanded only for what was chosen."""

    def make(
        weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> LinearFunction:
        made = {
            name: packed.make(weight, bias, device, dtype)
            if name not in ALTERNATIVES
            else ALTERNATIVES[name](weight, bias, device, dtype)
            for name in {row.kernel for row in rows}
        }
        columns, least = weight.shape[1], rows[0].M
        # Fewer tokens than were ever measured say nothing of each other.
        fewer = made[rows[0].kernel] if least == 1 else packed.make(weight, bias, device, dtype)

        def apply(x: Tensor) -> Tensor:
            tokens = x.numel() // columns
            row = row_at(rows, tokens)
            assert row is not None
            return fewer(x) if tokens < least else made[row.kernel](x)

        return apply

    return Kernel("measured", "the fastest by number of tokens, as measured here", make)


def _expanded_in(compute: torch.dtype) -> Callable[..., LinearFunction]:
    def make(
        weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> LinearFunction:
        inner = _expand_once(weight, bias, device, compute)
        return lambda x: inner(x.to(compute)).to(dtype)

    return make


def _natively_dense(
    weight: PackedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> LinearFunction:
    native = library()
    assert native is not None
    return _packed(native, Dense.kind).make(expanded(weight), bias, device, dtype)


# What may be faster than the packed form on a CPU, by the name that a table has for it.
NATIVE_DENSE = "native-dense"
ALTERNATIVES: Mapping[str, Callable[..., LinearFunction]] = {
    "torch-float32": _expanded_in(torch.float32),
    "torch-bfloat16": _expanded_in(torch.bfloat16),
    NATIVE_DENSE: _natively_dense,
}


def expanded(weight: PackedLinear) -> Dense:
    """A weight as dense floats: of its own dtype, or fp16 where it has codes."""
    if isinstance(weight, Dense):
        return weight
    dtype = weight.values.dtype if isinstance(weight, Sparse24) else torch.float16
    dense = weight.unpack(dtype)
    return Dense(dense if bool(dense.isfinite().all()) else weight.unpack(torch.float32))


@dataclass(frozen=True)
class Settled:
    """What a decoder that keeps to one form takes, and why: measured, or by the static rule."""

    expand: bool
    kernel: str
    why: str


def settled(product: Product, device_type: str = "cpu") -> Settled:
    """The form of a weight in a decoder that keeps to one: as for a single token.

    Raises:
        UnsupportedModel: there is no kernel.
    """
    kernel = choose(product.format, device_type)
    row = row_at(measured_rows(product, device_type), 1)
    if row is None or row.M > 1:
        return Settled(False, kernel.name, f"static: {kernel.why}")
    packed, dense = row.us.get(SPARSE), row.us.get(NATIVE_DENSE)
    if packed is None or dense is None:
        return Settled(False, kernel.name, f"static: {kernel.why}")
    times = f"{packed:.1f} us as packed, {dense:.1f} dense, for one token"
    if product.format != Dense.kind and dense * _MARGIN < packed:
        return Settled(True, f"{kernel.name}, expanded", f"measured: {times}")
    return Settled(False, kernel.name, f"measured: {times}")
