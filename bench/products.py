"""The products that a model is made of: one for each shape and format, with how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..errors import RefusedError
from ..kernels.cpu.library import Library
from ..kernels.cpu.packed import CODED, PackedWeight, pack_weight, round_weight
from ..kernels.dispatch import GPU_KINDS
from ..kernels.formats import FORMATS, Dense, Int4, Int8, PackedLinear, stacked
from ..kernels.measured import Product
from ..runtime.checkpoint import Checkpoint
from ..runtime.families import decoder_spec
from ..runtime.fused import rounds_end
from ..runtime.loading import Loader

_ROUNDED_GROUP = 32


@dataclass(frozen=True)
class ModelProduct:
    """One product of a model; `count` linears have it. `weight` reads the first of them.

    `rounded_bits` are those of a head that is rounded when it is loaded: dispatch never expands it.
    `in_parts` says that on a GPU the next kernel adds the parts of what K was parted into.
    """

    product: Product
    count: int
    weight: Callable[[], PackedLinear]
    rounded_bits: int | None = None
    in_parts: bool = False

    def pack(self, library: Library, weight: PackedLinear) -> PackedWeight:
        """As the decoder holds it; `weight` is what `self.weight` read."""
        if self.rounded_bits is None:
            return pack_weight(library, weight)
        return round_weight(library, weight.unpack(), self.rounded_bits)


@dataclass(frozen=True)
class _Collected:
    """Products found so far, equal ones together."""

    checkpoint: Checkpoint
    found: dict[Product, ModelProduct] = field(default_factory=dict)

    def stored(self, name: str, shape: tuple[int, int]) -> Product:
        """The product with a linear as the checkpoint has it."""
        entry = self.checkpoint.linears.get(name)
        kind = Dense.kind if entry is None else entry.format
        tensor = f"{name}.{FORMATS[kind].suffixes[0]}"
        known = None if kind in CODED else str(self.checkpoint.tensors.dtype(tensor))
        dtype = None if known is None else known.rpartition(".")[2]
        return Product(kind, None if entry is None else entry.group, dtype, *shape)

    def add(
        self,
        product: Product,
        weight: Callable[[], PackedLinear],
        bits: int | None = None,
        in_parts: bool = False,
    ) -> None:
        """Count one more; all else is of the first."""
        first = self.found.get(product) or ModelProduct(product, 0, weight, bits, in_parts)
        self.found[product] = replace(first, count=first.count + 1)


def model_products(checkpoint: Checkpoint, head_bits: int = 8) -> list[ModelProduct]:
    """All of a model's linears in the order of a token, the head last, equal ones together.

    Raises as `decoder_spec`.
    """
    spec, every = decoder_spec(checkpoint.config), _Collected(checkpoint)
    loader = Loader(checkpoint, spec, torch.float32, torch.device("cpu"))
    for layer in range(spec.layers):
        for linear in spec.linears(layer):
            read = partial(loader.linear, layer, linear.role, linear.expert)
            every.add(every.stored(linear.name, linear.shape), read)
    head, shape = spec.head_name, (spec.vocab, spec.embedded)
    if rounds_end(checkpoint, spec, head):
        kind, group = (Int8.kind, None) if head_bits == 8 else (Int4.kind, _ROUNDED_GROUP)
        every.add(Product(kind, group, None, *shape), lambda: loader.end(head), head_bits)
    else:
        every.add(every.stored(head, shape), lambda: loader.end(head))
    return list(every.found.values())


def gpu_products(checkpoint: Checkpoint) -> list[ModelProduct]:
    """Those that a GPU's kernels multiply by as packed: no dense linears, and no head.

    Linears of one input are one product where the decoder for GPUs stacks them.

    Raises:
        RefusedError: there is none; or as `decoder_spec`.
    """
    found = _gpu_products(checkpoint)
    if not found:
        raise RefusedError(f"{checkpoint.path} has no packed linears: torch multiplies on a GPU")
    return found


def _gpu_products(checkpoint: Checkpoint) -> list[ModelProduct]:
    from ..runtime.gpu_decoder import TOGETHER, lacking

    spec, every = decoder_spec(checkpoint.config), _Collected(checkpoint)
    if lacking(spec):
        return [p for p in model_products(checkpoint) if _on_gpu(p.product) and not p.rounded_bits]
    loader = Loader(checkpoint, spec, torch.float32, torch.device("cpu"))
    for layer in range(spec.layers):
        for roles in TOGETHER:
            linears = [spec.linear(layer, role) for role in roles]
            alone = [every.stored(linear.name, linear.shape) for linear in linears]
            if len({(p.format, p.group, p.dtype) for p in alone}) > 1:
                for product, role in zip(alone, roles, strict=True):
                    every.add(product, partial(loader.linear, layer, role))
                continue
            product = replace(alone[0], N=sum(p.N for p in alone))
            in_parts = spec.biased.isdisjoint(roles)
            every.add(product, partial(_stacked, loader, layer, roles), in_parts=in_parts)
    return [each for each in every.found.values() if _on_gpu(each.product)]


def _stacked(loader: Loader, layer: int, roles: Sequence[str]) -> PackedLinear:
    return stacked([loader.linear(layer, role) for role in roles])


def _on_gpu(product: Product) -> bool:
    return product.format in GPU_KINDS
