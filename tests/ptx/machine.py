"""The state of a kernel's threads, and how instructions read and write their operands.

Registers are arrays over all threads of all blocks that run together. An instruction is decoded
once into a function of that state.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .counters import sectors, wavefronts
from .memory import GlobalMemory
from .numbers import SIGNED, UNSIGNED, Array, PTXError, bits_of, type_of
from .program import Program
from .shared import Lanes, SharedMemory

Guard = Array | None  # which threads take part; None: all
Reader = Callable[["State"], Any]
Writer = Callable[["State", Any, Guard], None]
Step = Callable[["State", Guard], Any]

_SPECIAL = re.compile(r"%(ctaid|nctaid|tid|ntid)\.[xyz]|%laneid|%warpid")
_AXES = "xyz"


@dataclass(frozen=True)
class Copy:
    """Bytes on their way from global to shared memory."""

    offsets: Array
    values: Array
    lanes: Lanes


@dataclass
class State:
    """Some blocks that have done the same so far."""

    registers: list[Array]
    shared: SharedMemory
    blocks: list[tuple[int, int, int]]
    counter: int = 0
    groups: list[list[Copy]] = field(default_factory=list)
    open: list[Copy] = field(default_factory=list)


class Machine:
    """Operands of one program, the memory it runs on, and what it did there."""

    def __init__(self, program: Program) -> None:
        self.program, self.threads = program, program.threads
        self._slots = {name: slot for slot, name in enumerate(program.widths)}
        self.widths = list(program.widths.values())
        self.memory = GlobalMemory()
        self.arguments: dict[str, int] = {}
        self.grid = (1, 1, 1)
        self.counts: Counter[str] = Counter()
        self.counting = False
        # By kind of access: requests, what they cost, and the least for so many bytes.
        self.traffic: dict[str, Array] = defaultdict(lambda: np.zeros(3, np.int64))

    def size(self, state: State) -> int:
        """Threads of a state."""
        return len(state.blocks) * self.threads

    def spread(self, state: State, value: Any) -> Array:
        """A value as one number for each thread."""
        return np.broadcast_to(value, (self.size(state),))

    def lanes(self, active: Array) -> Lanes:
        """Where threads stand, by their number in the state."""
        return Lanes(active // self.threads, active % self.threads)

    def active(self, state: State, guard: Guard) -> Array:
        """Numbers of the threads that take part."""
        return np.arange(self.size(state)) if guard is None else np.nonzero(guard)[0]

    def guard(self, name: str, negated: bool) -> Reader:
        """A predicate as it stands."""
        slot = self._slots[name]
        if negated:
            return lambda state: ~state.registers[slot]
        return lambda state: state.registers[slot]

    def read(self, token: str, kind: str) -> Reader:
        """A register, a constant or a special register, as a PTX type."""
        token = token.strip()
        if kind == "pred":
            return self._predicate(token)
        bits, dtype = bits_of(kind), type_of(kind)
        if token in self._slots:
            slot = self._slots[token]
            if self.widths[slot] == bits:
                return lambda state: state.registers[slot].view(dtype)
            return lambda state: state.registers[slot].astype(UNSIGNED[bits]).view(dtype)
        if token == "global_smem":  # where dynamic shared memory begins
            return lambda state: dtype(0)
        if _SPECIAL.fullmatch(token):
            return lambda state: self._special(token, state).astype(dtype)
        constant = np.array(_constant(token) & ((1 << bits) - 1), UNSIGNED[bits])
        value = constant.reshape(1).view(dtype)[0]
        return lambda state: value

    def write(self, token: str) -> Writer:
        """Where results go; under a guard the other threads keep what they have."""
        token = token.strip()
        if token == "_":
            return lambda state, value, guard: None
        slot = self._slots[token]
        width = self.widths[slot]

        def put(state: State, value: Any, guard: Guard) -> None:
            value = np.asarray(value)
            if width != 1:
                if value.dtype.itemsize * 8 != width:
                    table = SIGNED if value.dtype.kind == "i" else UNSIGNED
                    value = value.astype(table[width])
                value = np.ascontiguousarray(value).reshape(-1 if value.ndim else 1)
                value = value.view(UNSIGNED[width])
            value = self.spread(state, value)
            before = state.registers[slot]
            state.registers[slot] = value if guard is None else np.where(guard, value, before)

        return put

    def address(self, token: str) -> Reader:
        """Of an operand such as [%rd1+16]: one number for each thread."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", token.strip())
        if found is None:
            raise PTXError(f"address {token}")
        name, offset = found.group(1), int(found.group(2) or 0)
        if name not in self._slots:
            return lambda state: np.full(self.size(state), offset, np.int64)
        slot = self._slots[name]
        if self.widths[slot] == 32:
            return lambda state: state.registers[slot].astype(np.int64) + offset
        return lambda state: state.registers[slot] + np.uint64(offset & (2**64 - 1))

    def count_global(self, what: str, addresses: Array, size: int, active: Array) -> None:
        """Note what an access of the first block costs."""
        self._count(what, sectors, addresses, size, active)

    def count_shared(self, what: str, offsets: Array, size: int, active: Array) -> None:
        """The same of shared memory."""
        self._count(what, wavefronts, offsets, size, active)

    def _count(
        self,
        what: str,
        cost: Callable[[Array, int, Array], tuple[int, int]],
        where: Array,
        size: int,
        active: Array,
    ) -> None:
        first = active < self.threads
        if self.counting and first.any():
            taken, least = cost(np.asarray(where)[first], size, active[first] // 32)
            self.traffic[what] += (1, taken, least)

    def _predicate(self, token: str) -> Reader:
        if token in ("0", "1", "-1"):
            value = token != "0"
            return lambda state: value
        return self.guard(token.lstrip("!"), token[0] == "!")

    def _special(self, token: str, state: State) -> Array:
        blocks, threads = len(state.blocks), self.threads
        own = np.tile(np.arange(threads), blocks)
        axis = _AXES.find(token[-1])
        if token == "%tid.x":
            return own
        if token in ("%tid.y", "%tid.z"):
            return own * 0
        if token == "%laneid":
            return own % 32
        if token == "%warpid":
            return own // 32
        if token.startswith("%ctaid"):
            return np.repeat(np.array([block[axis] for block in state.blocks]), threads)
        if token.startswith("%nctaid"):
            return own * 0 + self.grid[axis]
        return own * 0 + (threads if axis == 0 else 1)


def vector(operand: str) -> Sequence[str]:
    """The parts of {a, b, c, d}; of a single register itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _constant(token: str) -> int:
    if token in ("true", "false"):
        return int(token == "true")
    try:
        if token[:2] in ("0f", "0d"):
            return int(token[2:], 16)
        return int(token.rstrip("U"), 0)
    except ValueError as error:
        raise PTXError(f"operand {token}") from error
