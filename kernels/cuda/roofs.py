"""What memory bandwidth and tensor cores allow at most, from data sheets; nothing measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .fragments import BLOCK_COLUMNS
from .targets import Card
from .variants import Product

_META_BITS, _CODE_BITS, _SCALE_BITS, _HALF_BITS = 2, 4, 16, 16


def bits_per_weight(group: int) -> float:
    """Bits that are read for a weight, kept or not; `group` 0 means 16-bit values."""
    value = _CODE_BITS if group else _HALF_BITS
    scales = _SCALE_BITS / group if group else 0.0
    return (value + _META_BITS) / 2 + scales


@dataclass(frozen=True)
class Roof:
    """The least time of a product on a card, in microseconds: of its bytes, and of its sums."""

    memory_us: float
    tensor_us: float

    @property
    def us(self) -> float:
        """The greater of the two."""
        return max(self.memory_us, self.tensor_us)


def sparse_roof(product: Product, card: Card) -> Roof:
    """Weights, tokens and results once through memory; sums at twice the dense rate.

    Of a dense weight of codes too, for which that makes as many sums as cores for dense ones do.
    """
    if product.dense:
        x = replace(product, K=product.K // 2)
        return _roof(x, card, _CODE_BITS + _SCALE_BITS / min(product.group, BLOCK_COLUMNS), 1)
    return _roof(product, card, bits_per_weight(product.group), 2)


def dense_roof(product: Product, card: Card) -> Roof:
    """The same of a dense 16-bit weight."""
    return _roof(product, card, _HALF_BITS, 1)


def _roof(product: Product, card: Card, bits: float, rate: int) -> Roof:
    weights = product.N * product.K * bits / 8
    others = 2 * product.M * (product.N + product.K)
    operations = 2 * product.M * product.N * product.K
    return Roof((weights + others) / card.gb_per_s / 1e3, operations / rate / card.tflops / 1e6)


@dataclass(frozen=True)
class DecodeRoof:
    """The most tokens a second of a whole model, its linears all alike, its head in 16 bits.

    Keys and values, norms and launches are left out, so that no machine can reach it.
    """

    sparse: float
    dense: float


def decode_roof(
    linears: Iterable[tuple[int, int]], head: tuple[int, int], batch: int, group: int, card: Card
) -> DecodeRoof:
    """For `linears` (N, K) of all blocks, one step of `batch` sequences at a time."""
    last = dense_roof(Product(batch, *head, "f16", 0), card).us
    products = [Product(batch, rows, columns, "f16", group) for rows, columns in linears]
    sparse = last + sum(sparse_roof(product, card).us for product in products)
    dense = last + sum(dense_roof(product, card).us for product in products)
    return DecodeRoof(batch * 1e6 / sparse, batch * 1e6 / dense)
