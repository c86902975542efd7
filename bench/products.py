"""The products that a model is made of: one for each shape and format, with how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..kernels.cpu.library import Library
from ..kernels.cpu.packed import CODED, PackedWeight, pack_weight, round_weight
from ..kernels.formats import FORMATS, Dense, Int4, Int8, PackedLinear
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
    """

    product: Product
    count: int
    weight: Callable[[], PackedLinear]
    rounded_bits: int | None = None

    def pack(self, library: Library, weight: PackedLinear) -> PackedWeight:
        """As the decoder holds it; `weight` is what `self.weight` read."""
        if self.rounded_bits is None:
            return pack_weight(library, weight)
        return round_weight(library, weight.unpack(), self.rounded_bits)


def model_products(checkpoint: Checkpoint, head_bits: int = 8) -> list[ModelProduct]:
    """All of a model's linears in the order of a token, the head last, equal ones together.

    Raises as `decoder_spec`.
    """
    spec = decoder_spec(checkpoint.config)
    loader = Loader(checkpoint, spec, torch.float32, torch.device("cpu"))
    found: dict[Product, ModelProduct] = {}

    def add(product: Product, weight: Callable[[], PackedLinear], bits: int | None = None) -> None:
        old = found.get(product)
        count = 1 if old is None else old.count + 1
        found[product] = ModelProduct(product, count, weight if old is None else old.weight, bits)

    def stored(name: str, shape: tuple[int, int]) -> Product:
        entry = checkpoint.linears.get(name)
        kind = Dense.kind if entry is None else entry.format
        floats = f"{name}.{FORMATS[kind].suffixes[0]}"
        dtype = None if kind in CODED else str(checkpoint.tensors.dtype(floats)).rpartition(".")[2]
        return Product(kind, None if entry is None else entry.group, dtype, *shape)

    for layer in range(spec.layers):
        for linear in spec.linears(layer):
            read = partial(loader.linear, layer, linear.role, linear.expert)
            add(stored(linear.name, linear.shape), read)
    head, shape = spec.head_name, (spec.vocab, spec.embedded)
    if rounds_end(checkpoint, spec, head):
        kind, group = (Int8.kind, None) if head_bits == 8 else (Int4.kind, _ROUNDED_GROUP)
        add(Product(kind, group, None, *shape), lambda: loader.end(head), head_bits)
    else:
        add(stored(head, shape), lambda: loader.end(head))
    return list(found.values())
