"""Compiles the sparse product's variants, and says what a GPU would have to work with.

A roof is what memory bandwidth and tensor cores allow at most. Nothing here is a time that anybody
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .aot import Compiled, Signature, compile_kernel
from .sparse_gemm import sparse_gemm
from .targets import ARCHITECTURES, Card
from .variants import Product, Variant, all_variants, choose

_TYPES = {"f16": "*fp16", "bf16": "*bf16"}
_SIZES = ("M", "N", "K", "KB", "T")
# What the callers of the kernel see to (linear.py): whole lines, and rows of whole vectors.
_ALIGNED = ("x", "w", "e", "s", "bias", "residual", "y", "N", "K")
_META_BITS, _SCALE_BITS = 2, 16


@dataclass(frozen=True)
class Row:
    """What became of one variant on one architecture."""

    variant: Variant
    compiled: Compiled

    @property
    def products_per_step(self) -> float:
        """Sparse tensor-core instructions of a warp in a step of 64 WK columns."""
        return self._per_step(lambda name: name.startswith("HMMA.SP"))

    @property
    def instructions_per_step(self) -> float:
        """All instructions of a warp in a step."""
        return self._per_step(lambda name: True)

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once."""
        limits = ARCHITECTURES[self.compiled.arch]
        made = self.compiled
        return limits.resident(made.registers, made.shared_bytes, made.warps)

    def _per_step(self, wanted: Callable[[str], bool]) -> float:
        counted = sum(count for name, count in self.compiled.loop.items() if wanted(name))
        return counted / self.variant.stages


def signature(variant: Variant) -> Signature:
    """How the sparse product of a variant is called."""
    own = _TYPES[variant.kind]
    types = dict.fromkeys(("x", "w", "e", "s"), "*i32")
    types |= {"bias": own, "residual": own, "y": "*fp32" if variant.splits else own}
    types |= dict.fromkeys(_SIZES, "i32")
    return Signature(types, {"V": variant}, _ALIGNED)


def build(variant: Variant, arch: int) -> Row:
    """Compile one variant.

    Raises:
        HalfweaveError: the compiler refuses it.
    """
    made = compile_kernel(sparse_gemm, signature(variant), arch, variant.tile.warps)
    return Row(variant, made)


def build_all(architectures: Iterable[int]) -> Iterator[Row]:
    """Every variant that dispatch can choose, on every architecture."""
    for arch in architectures:
        for variant in all_variants(ARCHITECTURES[arch]):
            yield build(variant, arch)


def bits_per_weight(group: int) -> float:
    """Bits that are read for a weight, kept or not; `group` 0 means 16-bit values."""
    values = 4 if group else 16
    scales = _SCALE_BITS / group if group else 0.0
    return values / 2 + _META_BITS / 2 + scales


@dataclass(frozen=True)
class Roof:
    """The least time of a product on a card, in microseconds: of its bytes, and of its sums."""

    memory_us: float
    tensor_us: float

    @property
    def us(self) -> float:
        """The greater of the two."""
        return max(self.memory_us, self.tensor_us)


def roof(product: Product, card: Card) -> Roof:
    """Weights, tokens and results once through memory, sums at twice the dense rate."""
    weights = product.N * product.K * bits_per_weight(product.group) / 8
    others = 2 * product.M * (product.N + product.K)
    sums = 2 * product.M * product.N * product.K / 2
    return Roof(
        (weights + others) / card.gb_per_s / 1e3,
        sums / card.tflops / 1e6,
    )


def choice_text(product: Product, card: Card) -> str:
    """The tile that a product gets on a card, in words."""
    chosen = choose(product, ARCHITECTURES[card.arch], card.multiprocessors)
    tile = chosen.tile
    return f"{tile.BN}x{tile.BM}x{64 * tile.WK}, {tile.warps} warps, split {chosen.splits}"
