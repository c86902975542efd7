"""Names of PTX types as numpy types, and bf16, which numpy lacks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}


class PTXError(RuntimeError):
    """The program does what PTX leaves undefined, or what this emulator does not know."""


def bits_of(kind: str) -> int:
    """Bits of a register of a type such as u32, f16x2 or bf16."""
    digits = kind.lstrip("bfsu")
    if digits.endswith("x2"):
        return 2 * int(digits[:-2])
    return int(digits)


def is_float(kind: str) -> bool:
    """Whether a type is one of floats, packed pairs and bf16 included."""
    return "f" in kind


def is_bfloat(kind: str) -> bool:
    """bf16 and pairs of it."""
    return kind.startswith("bf")


def type_of(kind: str) -> type[np.generic]:
    """The numpy type that holds a register of a PTX type; pairs and bf16 are held as bits."""
    bits = bits_of(kind)
    if is_bfloat(kind) or kind.endswith("x2"):
        return UNSIGNED[bits]
    return {"f": FLOATS, "s": SIGNED}.get(kind[0], UNSIGNED)[bits]


def bfloat_to_float(bits: Array) -> Array:
    """bf16 as uint16 to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat(values: Array) -> Array:
    """fp32 to bf16 as uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + odd) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)
