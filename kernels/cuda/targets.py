"""What the architectures allow a program, and cards to name roofs of. Facts from NVIDIA's tables.

CUDA C++ Programming Guide, "Technical specifications per compute capability"; data sheets of the
cards (memory bandwidth, dense fp16 with fp32 sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_REGISTER_STEP = 256  # a warp's registers are given out in these
_SYSTEM_SHARED = 1024  # bytes of each program that are not its own


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor: shared bytes of a program and in all, and what fits at once.

    `wide_products`: dense products have instructions of four warps (wgmma), which are faster than
    those of one, sparse or not.
    """

    shared_per_program: int
    shared: int
    warps: int
    programs: int
    registers: int = 65536
    wide_products: bool = False

    def resident(self, registers: int, shared_bytes: int, warps: int) -> int:
        """Programs that fit at the same time, each thread having so many registers."""
        if shared_bytes > self.shared_per_program:
            return 0
        per_warp = -(-registers * 32 // _REGISTER_STEP) * _REGISTER_STEP
        return min(
            self.registers // (per_warp * warps),
            self.shared // (shared_bytes + _SYSTEM_SHARED),
            self.warps // warps,
            self.programs,
        )


ARCHITECTURES: Mapping[int, Architecture] = {
    80: Architecture(166912, 167936, 64, 32),
    86: Architecture(101376, 102400, 48, 16),
    89: Architecture(101376, 102400, 48, 24),
    90: Architecture(232448, 233472, 64, 32, wide_products=True),
}


@dataclass(frozen=True)
class Card:
    """A card's multiprocessors, memory bandwidth in GB/s, and dense 16-bit TFLOPS."""

    arch: int
    multiprocessors: int
    gb_per_s: float
    tflops: float


CARDS: Mapping[str, Card] = {
    "A100-80GB": Card(80, 108, 2039, 312),
    "A10": Card(86, 72, 600, 125),
    "RTX 3090": Card(86, 82, 936, 71),
    "RTX 4090": Card(89, 128, 1008, 165),
    "H100 SXM": Card(90, 132, 3350, 989),
    "H200": Card(90, 132, 4800, 989),
}
