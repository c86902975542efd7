"""Compiles the sparse product's variants, and says what a GPU would have to work with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .aot import Compiled, Signature, compile_kernel
from .sparse_gemm import sparse_gemm
from .targets import ARCHITECTURES
from .variants import Variant, all_variants

_TYPES = {"f16": "*fp16", "bf16": "*bf16"}
_SIZES = ("M", "N", "K", "KB", "T")
# What the callers of the kernel see to (linear.py): whole lines, and rows of whole vectors.
_ALIGNED = ("x", "w", "e", "s", "bias", "residual", "y", "N", "K")


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
    tile = variant.tile
    made = compile_kernel(sparse_gemm, signature(variant), arch, tile.warps, tile.registers)
    return Row(variant, made)


def every_variant(architectures: Iterable[int]) -> list[tuple[Variant, int]]:
    """All that dispatch can choose, with the architecture to build it for."""
    return [
        (variant, arch) for arch in architectures for variant in all_variants(ARCHITECTURES[arch])
    ]
