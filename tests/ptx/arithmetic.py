"""Instructions on integers and floats, comparisons and conversions.

Floats are computed in fp64 and rounded once, so that a fused multiply-add is one; approximate
functions are exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Guard, Machine, State, Step
from .numbers import (
    SIGNED,
    UNSIGNED,
    Array,
    PTXError,
    bfloat_to_float,
    bits_of,
    float_to_bfloat,
    is_bfloat,
    is_float,
    type_of,
)

Parts = tuple[str, ...]
Handler = Callable[[Machine, Parts, Parts], Step]

_COMPARE: dict[str, Callable[[Any, Any], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_ROUND: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def _integers(
    machine: Machine, kind: str, operands: Parts, count: int, compute: Callable[..., Any]
) -> Step:
    """`compute` of `count` sources, in the instruction's own type."""
    sources = [machine.read(each, kind) for each in operands[1 : 1 + count]]
    put = machine.write(operands[0])

    def go(state: State, guard: Guard) -> None:
        put(state, compute(*[source(state) for source in sources]), guard)

    return go


def _floats(
    machine: Machine, kind: str, operands: Parts, count: int, compute: Callable[..., Any]
) -> Step:
    """The same in fp64, rounded once to the instruction's type."""
    sources = [machine.read(each, kind) for each in operands[1 : 1 + count]]
    put = machine.write(operands[0])

    def widened(value: Any) -> Array:
        value = np.atleast_1d(np.asarray(value))
        if bits_of(kind) == 64 or kind == "f32":
            return value.astype(np.float64)
        halves = np.ascontiguousarray(value).view(np.uint16).reshape(value.size, -1)
        own = bfloat_to_float(halves) if is_bfloat(kind) else halves.view(np.float16)
        return own.astype(np.float64)

    def narrowed(value: Array) -> Array:
        if kind in ("f32", "f64"):
            return value.astype(type_of(kind))
        if is_bfloat(kind):
            halves = float_to_bfloat(value.astype(np.float32))
        else:
            halves = value.astype(np.float16).view(np.uint16)
        halves = np.ascontiguousarray(halves)
        return halves.view(np.uint32).reshape(-1) if kind.endswith("x2") else halves.reshape(-1)

    def go(state: State, guard: Guard) -> None:
        with np.errstate(all="ignore"):
            result = compute(*[widened(source(state)) for source in sources])
        put(state, narrowed(result), guard)

    return go


def _either(
    integers: Callable[..., Any], floats: Callable[..., Any] | None = None, count: int = 2
) -> Handler:
    """An instruction that is there for both, with the same number of sources."""

    def build(machine: Machine, parts: Parts, operands: Parts) -> Step:
        kind = parts[-1]
        if is_float(kind):
            return _floats(machine, kind, operands, count, floats or integers)
        return _integers(machine, kind, operands, count, integers)

    return build


def _only_floats(compute: Callable[..., Any], count: int = 1) -> Handler:
    def build(machine: Machine, parts: Parts, operands: Parts) -> Step:
        return _floats(machine, parts[-1], operands, count, compute)

    return build


def _logic(compute: Callable[..., Any], count: int = 2) -> Handler:
    """Of bits, or of predicates."""

    def build(machine: Machine, parts: Parts, operands: Parts) -> Step:
        return _integers(machine, parts[-1], operands, count, compute)

    return build


def _signed_quotient(x: Any, y: Any) -> Any:
    """Towards zero, as PTX has it; numpy rounds down."""
    if np.asarray(x).dtype.kind != "i":
        return x // y
    return np.abs(x) // np.abs(y) * (np.sign(x) * np.sign(y))


def multiply(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """mul of floats, and of integers with the lower, the upper, or all bits of the product."""
    if is_float(parts[-1]):
        return _floats(machine, parts[-1], operands, 2, lambda x, y: x * y)
    return _integer_product(machine, parts, operands, adds=False)


def multiply_add(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """mad: the same, and a third operand added."""
    if is_float(parts[-1]):
        return _floats(machine, parts[-1], operands, 3, lambda x, y, z: x * y + z)
    return _integer_product(machine, parts, operands, adds=True)


def _integer_product(machine: Machine, parts: Parts, operands: Parts, adds: bool) -> Step:
    kind, wide = parts[-1], "wide" in parts
    bits = bits_of(kind)
    double = (SIGNED if kind[0] == "s" else UNSIGNED)[min(64, 2 * bits)]
    if "hi" in parts and bits == 64:
        raise PTXError("the upper half of a 128-bit product")
    put = machine.write(operands[0])
    first, second = machine.read(operands[1], kind), machine.read(operands[2], kind)
    added = f"{kind[0]}{2 * bits}" if wide else kind
    third = machine.read(operands[3], added) if adds else None

    def go(state: State, guard: Guard) -> None:
        x, y = first(state), second(state)
        with np.errstate(all="ignore"):
            if wide:
                result = x.astype(double) * y.astype(double)
            elif "hi" in parts:
                product = x.astype(double) * y.astype(double)
                result = (product >> double(bits)).astype(type_of(kind))
            else:
                result = x * y
            put(state, result if third is None else result + third(state), guard)

    return go


def shift_left(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """shl: by at least its bits gives zero."""
    bits = bits_of(parts[-1])
    put = machine.write(operands[0])
    value, by = machine.read(operands[1], f"u{bits}"), machine.read(operands[2], "u32")

    def go(state: State, guard: Guard) -> None:
        count = by(state)
        shifted = value(state) << np.minimum(count, bits - 1).astype(UNSIGNED[bits])
        put(state, np.where(count < bits, shifted, 0).astype(UNSIGNED[bits]), guard)

    return go


def shift_right(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """shr: of signed numbers the sign comes in from the left."""
    bits, signed = bits_of(parts[-1]), parts[-1][0] == "s"
    table = SIGNED if signed else UNSIGNED
    put = machine.write(operands[0])
    value = machine.read(operands[1], f"{'s' if signed else 'u'}{bits}")
    by = machine.read(operands[2], "u32")

    def go(state: State, guard: Guard) -> None:
        count = by(state)
        shifted = value(state) >> np.minimum(count, bits - 1).astype(table[bits])
        if not signed:
            shifted = np.where(count < bits, shifted, 0).astype(UNSIGNED[bits])
        put(state, shifted, guard)

    return go


def funnel_shift(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """shf: one word out of two that stand side by side."""
    put = machine.write(operands[0])
    low, high, by = (machine.read(each, "u32") for each in operands[1:4])

    def go(state: State, guard: Guard) -> None:
        count = by(state)
        count = np.minimum(count, 32) if "clamp" in parts else count & np.uint32(31)
        count = np.asarray(count).astype(np.uint64)
        both = high(state).astype(np.uint64) << np.uint64(32) | low(state).astype(np.uint64)
        left = both << count >> np.uint64(32)
        put(state, (left if parts[1] == "l" else both >> count).astype(np.uint32), guard)

    return go


def extract_bits(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """bfe with constant position and length."""
    kind = parts[-1]
    bits, put = bits_of(kind), machine.write(operands[0])
    value = machine.read(operands[1], f"u{bits}")
    position, length = (int(each, 0) & 255 for each in operands[2:4])

    def go(state: State, guard: Guard) -> None:
        field = value(state).astype(np.uint64) >> np.uint64(position)
        field = field & np.uint64((1 << length) - 1)
        if kind[0] == "s" and length:
            negative = field >> np.uint64(length - 1) & np.uint64(1)
            field = np.where(negative, field | np.uint64(2**64 - (1 << length)), field)
        put(state, field.astype(UNSIGNED[bits]), guard)

    return go


def insert_bits(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """bfi with constant position and length."""
    bits, put = bits_of(parts[-1]), machine.write(operands[0])
    field, into = (machine.read(each, f"u{bits}") for each in operands[1:3])
    position, length = (int(each, 0) & 255 for each in operands[3:5])
    mask = UNSIGNED[bits]((((1 << length) - 1) << position) & ((1 << bits) - 1))

    def go(state: State, guard: Guard) -> None:
        moved = field(state) << UNSIGNED[bits](position)
        put(state, (into(state) & ~mask) | (moved & mask), guard)

    return go


def permute_bytes(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """prmt: each byte of the result is one of eight, or its sign eight times."""
    if len(parts) > 2:
        raise PTXError("a mode of prmt")
    put = machine.write(operands[0])
    low, high, selectors = (machine.read(each, "u32") for each in operands[1:4])

    def go(state: State, guard: Guard) -> None:
        both = high(state).astype(np.uint64) << np.uint64(32) | low(state).astype(np.uint64)
        chosen, result = selectors(state), np.uint32(0)
        for at in range(4):
            which = (chosen >> np.uint32(4 * at)) & np.uint32(15)
            shift = (which & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = (both >> shift & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            byte = np.where(which & np.uint32(8), sign, byte)
            result = result | byte << np.uint32(8 * at)
        put(state, result, guard)

    return go


def three_way_logic(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """lop3: any function of three bits, as a table of eight."""
    table, put = int(operands[4], 0), machine.write(operands[0])
    sources = [machine.read(each, "u32") for each in operands[1:4]]

    def go(state: State, guard: Guard) -> None:
        x, y, z = (source(state) for source in sources)
        result = np.uint32(0)
        for case in range(8):
            if table >> case & 1:
                result = result | (
                    (x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z)
                )
        put(state, result, guard)

    return go


def compare(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """setp: a predicate from two values, perhaps combined with another one."""
    how, kind = parts[1], parts[-1]
    put = machine.write(operands[0])
    first, second = (machine.read(each, kind) for each in operands[1:3])
    combine = _COMBINE.get(parts[2])
    other = machine.read(operands[3], "pred") if combine else None
    unordered = is_float(kind) and len(how) == 3 and how[-1] == "u"

    def go(state: State, guard: Guard) -> None:
        x, y = first(state), second(state)
        if is_bfloat(kind):
            x, y = bfloat_to_float(np.atleast_1d(x)), bfloat_to_float(np.atleast_1d(y))
        if how in ("nan", "num"):
            neither = ~(np.isnan(x) | np.isnan(y))
            result = neither if how == "num" else ~neither
        else:
            result = _COMPARE[how[:2]](x, y)
            if how == "ne" and is_float(kind):
                result = result & ~(np.isnan(x) | np.isnan(y))
            if unordered:
                result = result | np.isnan(x) | np.isnan(y)
        if combine is not None and other is not None:
            result = combine(result, other(state))
        put(state, result, guard)

    return go


def select(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """selp: one of two by a predicate."""
    kind = f"u{bits_of(parts[-1])}"
    put, which = machine.write(operands[0]), machine.read(operands[3], "pred")
    first, second = (machine.read(each, kind) for each in operands[1:3])

    def go(state: State, guard: Guard) -> None:
        put(state, np.where(which(state), first(state), second(state)), guard)

    return go


def move(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """mov: a value; or a wide register to its parts, or parts to a wide register."""
    kind = parts[-1]
    if kind == "pred":
        return _integers(machine, "pred", operands, 1, lambda x: x)
    bits = bits_of(kind)
    if operands[0].startswith("{"):
        outputs = [machine.write(each) for each in operands[0].strip("{} ").split(",")]
        value, part = machine.read(operands[1], f"u{bits}"), UNSIGNED[bits // len(outputs)]

        def take_apart(state: State, guard: Guard) -> None:
            whole = np.ascontiguousarray(machine.spread(state, value(state)))
            pieces = whole.view(part).reshape(-1, len(outputs))
            for at, put in enumerate(outputs):
                put(state, pieces[:, at], guard)

        return take_apart
    if operands[1].startswith("{"):
        names = operands[1].strip("{} ").split(",")
        inputs = [machine.read(each, f"u{bits // len(names)}") for each in names]
        put_whole = machine.write(operands[0])

        def join(state: State, guard: Guard) -> None:
            pieces = np.stack([machine.spread(state, each(state)) for each in inputs], 1)
            put_whole(state, pieces.reshape(-1).view(UNSIGNED[bits]), guard)

        return join
    return _integers(machine, f"u{bits}", operands, 1, lambda x: x)


def convert_address(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """cvta: all memories have one way of being addressed here."""
    return _integers(machine, "u64", operands, 1, lambda x: x)


def convert(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """cvt between integers and floats; two floats to a pair of halves."""
    to, source = parts[-2], parts[-1]
    put = machine.write(operands[0])
    if to in ("f16x2", "bf16x2"):
        upper, lower = (machine.read(each, source) for each in operands[1:3])

        def pair(state: State, guard: Guard) -> None:
            halves = [
                float_to_bfloat(value)
                if is_bfloat(to)
                else value.astype(np.float16).view(np.uint16)
                for value in (np.atleast_1d(upper(state)), np.atleast_1d(lower(state)))
            ]
            high, low = (half.astype(np.uint32) for half in halves)
            put(state, high << np.uint32(16) | low, guard)

        return pair
    value = machine.read(operands[1], source)

    def go(state: State, guard: Guard) -> None:
        put(state, _converted(np.atleast_1d(value(state)), source, to, parts), guard)

    return go


def _converted(value: Array, source: str, to: str, parts: Parts) -> Array:
    if is_bfloat(source):
        value = bfloat_to_float(value)
    with np.errstate(all="ignore"):
        if is_bfloat(to):
            return float_to_bfloat(value.astype(np.float32))
        if is_float(to):
            return value.astype(type_of(to))
        if value.dtype.kind != "f":
            return value.astype(type_of(to))
        rounding = next((part for part in parts if part in _ROUND), None)
        if rounding is None:
            raise PTXError("a conversion to integers that does not say how to round")
        limits = np.iinfo(type_of(to))
        whole = np.nan_to_num(_ROUND[rounding](value.astype(np.float64)))
        return np.clip(whole, limits.min, limits.max).astype(type_of(to))


HANDLERS: dict[str, Handler] = {
    "abs": _either(np.abs, count=1),
    "add": _either(lambda x, y: x + y),
    "and": _logic(lambda x, y: x & y),
    "bfe": extract_bits,
    "bfi": insert_bits,
    "cvt": convert,
    "cvta": convert_address,
    "div": _either(_signed_quotient, lambda x, y: x / y),
    "ex2": _only_floats(np.exp2),
    "fma": _only_floats(lambda x, y, z: x * y + z, 3),
    "lg2": _only_floats(np.log2),
    "lop3": three_way_logic,
    "mad": multiply_add,
    "max": _either(np.maximum, np.fmax),
    "min": _either(np.minimum, np.fmin),
    "mov": move,
    "mul": multiply,
    "neg": _either(lambda x: -x, count=1),
    "not": _logic(lambda x: ~x, 1),
    "or": _logic(lambda x, y: x | y),
    "prmt": permute_bytes,
    "rcp": _only_floats(lambda x: 1 / x),
    "rem": _either(lambda x, y: np.fmod(x, y) if x.dtype.kind == "i" else x % y),
    "rsqrt": _only_floats(lambda x: 1 / np.sqrt(x)),
    "selp": select,
    "setp": compare,
    "shf": funnel_shift,
    "shl": shift_left,
    "shr": shift_right,
    "sqrt": _only_floats(np.sqrt),
    "sub": _either(lambda x, y: x - y),
    "xor": _logic(lambda x, y: x ^ y),
}
