"""Instructions that go to memory, wait, or move values between the lanes of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Handler, Parts
from .machine import Copy, Guard, Machine, State, Step, vector
from .numbers import UNSIGNED, Array, PTXError, bits_of, type_of

RETURN = "return"
_ATOMIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, own: old + own,
    "max": max,
    "min": min,
    "exch": lambda old, own: own,
    "or": lambda old, own: old | own,
}


def load(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """ld of a parameter, of global or of shared memory, one to four registers."""
    bits = bits_of(parts[-1])
    if parts[1] == "param":
        return _load_parameter(machine, operands, bits)
    outputs = [machine.write(each) for each in vector(operands[0])]
    size, where = bits // 8 * len(outputs), machine.address(operands[1])
    shared = "shared" in parts

    def go(state: State, guard: Guard) -> None:
        active = machine.active(state, guard)
        found = np.zeros((machine.size(state), size), np.uint8)
        if len(active):
            at = where(state)[active]
            if shared:
                machine.count_shared("ld.shared", at, size, active)
                found[active] = state.shared.load(at.astype(np.int64), size, machine.lanes(active))
            else:
                machine.count_global("ld.global", at, size, active)
                found[active] = machine.memory.bytes[machine.memory.indices(at, size)]
        registers = found.view(UNSIGNED[bits])
        for index, put in enumerate(outputs):
            put(state, np.ascontiguousarray(registers[:, index]), guard)

    return go


def _load_parameter(machine: Machine, operands: Parts, bits: int) -> Step:
    named = re.search(r"\[(\w+)", operands[1])
    if named is None:
        raise PTXError(f"parameter {operands[1]}")
    name, put = named.group(1), machine.write(operands[0])

    def go(state: State, guard: Guard) -> None:
        value = machine.arguments[name] & ((1 << bits) - 1)
        put(state, np.array(value, UNSIGNED[bits]), guard)

    return go


def store(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """st to global or shared memory, one to four registers."""
    bits, shared = bits_of(parts[-1]), "shared" in parts
    sources = [machine.read(each, f"u{bits}") for each in vector(operands[1])]
    size, where = bits // 8 * len(sources), machine.address(operands[0])

    def go(state: State, guard: Guard) -> None:
        active = machine.active(state, guard)
        if not len(active):
            return
        values = np.stack([machine.spread(state, each(state)) for each in sources], 1)
        values = values.view(np.uint8).reshape(machine.size(state), size)[active]
        at = where(state)[active]
        if shared:
            machine.count_shared("st.shared", at, size, active)
            state.shared.store(at.astype(np.int64), values, machine.lanes(active))
        else:
            machine.count_global("st.global", at, size, active)
            machine.memory.bytes[machine.memory.indices(at, size)] = values

    return go


def copy_async(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """cp.async: the copy itself, the end of a group of them, and waiting."""
    if parts[2] == "commit_group":
        return _commit
    if parts[2] in ("wait_group", "wait_all"):
        return _wait(int(operands[0]) if operands else 0, everything=parts[2] == "wait_all")
    to, source, size = (
        machine.address(operands[0]),
        machine.address(operands[1]),
        int(operands[2], 0),
    )
    limit = machine.read(operands[3], "u32") if len(operands) > 3 else None

    def go(state: State, guard: Guard) -> None:
        active = machine.active(state, guard)
        if not len(active):
            return
        real = machine.spread(state, size if limit is None else limit(state))[active]
        whole = real == size
        if not np.all(whole | (real == 0)):
            raise PTXError("a copy of a part of its bytes")
        values = np.zeros((len(active), size), np.uint8)
        if whole.any():
            at = source(state)[active][whole]
            values[whole] = machine.memory.bytes[machine.memory.indices(at, size)]
            machine.count_global("cp.async.global", at, size, active[whole])
        offsets, lanes = to(state)[active].astype(np.int64), machine.lanes(active)
        machine.count_shared("cp.async.shared", offsets, size, active)
        state.shared.begin_copy(offsets, size, lanes)
        state.open.append(Copy(offsets, values, lanes))

    return go


def _commit(state: State, guard: Guard) -> None:
    state.groups.append(state.open)
    state.open = []


def _wait(keep: int, everything: bool) -> Step:
    """Data lands here and not before: a missing wait is then always seen."""

    def go(state: State, guard: Guard) -> None:
        if everything:
            _commit(state, guard)
        while len(state.groups) > keep:
            for copy in state.groups.pop(0):
                state.shared.end_copy(copy.offsets, copy.values, copy.lanes)

    return go


def atomic(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """atom and red on global memory: one thread after the other."""
    dtype, operation, returns = type_of(parts[-1]), parts[-2], parts[0] == "atom"
    where = machine.address(operands[1] if returns else operands[0])
    value = machine.read(operands[2] if returns else operands[1], parts[-1])
    put = machine.write(operands[0]) if returns else None
    if operation not in _ATOMIC:
        raise PTXError(f"atomic {operation}")

    def go(state: State, guard: Guard) -> None:
        given, before = machine.spread(state, value(state)), np.zeros(machine.size(state), dtype)
        addresses, size = where(state), np.dtype(dtype).itemsize
        for thread in machine.active(state, guard):
            at = machine.memory.indices(addresses[thread : thread + 1], size)[0]
            old, own = machine.memory.bytes[at].view(dtype)[0], given[thread]
            with np.errstate(over="ignore"):
                new = _ATOMIC[operation](old, own)
            before[thread] = old
            machine.memory.bytes[at] = np.array([new], dtype).view(np.uint8)
        if put is not None:
            put(state, before.view(UNSIGNED[8 * size]), guard)

    return go


def barrier(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """bar: of a warp nothing, since its lanes go together here."""
    if parts[1] == "warp":
        return _nothing

    def go(state: State, guard: Guard) -> None:
        if guard is not None:
            raise PTXError("a barrier under a predicate")
        state.shared.barrier()

    return go


def _nothing(state: State, guard: Guard) -> None:
    pass


def fence(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """fence and membar: accesses happen in order here."""
    return _nothing


def finish(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """ret and exit, of all threads."""

    def go(state: State, guard: Guard) -> str:
        if guard is not None:
            raise PTXError("a return under a predicate")
        return RETURN

    return go


def branch(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """bra: where to, and who goes."""
    return lambda state, guard: (machine.program.labels[operands[0]], guard)


def cache_policy(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """createpolicy: caches are not modelled."""
    put = machine.write(operands[0])
    return lambda state, guard: put(state, np.array(0, np.uint64), guard)


def shuffle(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """shfl.sync: each lane gets the value of another of its warp."""
    names = operands[0].split("|")
    put, mode = machine.write(names[0]), parts[2]
    reached = machine.write(names[1]) if len(names) > 1 else None
    value, by, limits = (machine.read(each, "u32") for each in operands[1:4])

    def go(state: State, guard: Guard) -> None:
        count = machine.size(state)
        lane, shift = np.arange(count) % 32, machine.spread(state, by(state)).astype(int)
        control = int(np.max(limits(state)))
        segment = control >> 8 & 31
        most, least = (lane & segment) | (control & 31 & ~segment), lane & segment
        other = {
            "bfly": lane ^ shift,
            "idx": least | (shift & ~segment),
            "up": lane - shift,
            "down": lane + shift,
        }[mode]
        there = other >= most if mode == "up" else other <= most
        warp = np.arange(count) // 32 * 32
        found = machine.spread(state, value(state))[warp + np.where(there, other, lane)]
        put(state, found, guard)
        if reached is not None:
            reached(state, there, guard)

    return go


def load_matrices(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """ldmatrix: 8 x 8 halves each, a row from every lane's address, in fragment order."""
    outputs = [machine.write(each) for each in vector(operands[0])]
    count, where, transposed = len(outputs), machine.address(operands[1]), "trans" in parts

    def go(state: State, guard: Guard) -> None:
        if guard is not None:
            raise PTXError("ldmatrix under a predicate")
        offsets = where(state).astype(np.int64)
        total = len(offsets)
        active = np.nonzero(np.arange(total) % 32 < 8 * count)[0]
        machine.count_shared("ldmatrix", offsets[active], 16, active)
        rows = state.shared.load(offsets[active], 16, machine.lanes(active))
        halves = rows.reshape(total // 32, count, 8, 16).view(np.uint16)
        lane = np.arange(32)
        row, column = lane // 4, 2 * (lane % 4)
        for index, put in enumerate(outputs):
            own = halves[:, index]
            low, high = (
                (own[:, column, row], own[:, column + 1, row])
                if transposed
                else (own[:, row, column], own[:, row, column + 1])
            )
            pair = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
            put(state, pair.reshape(-1), None)

    return go


def store_matrices(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """stmatrix: the way back."""
    sources = [machine.read(each, "u32") for each in vector(operands[1])]
    count, where, transposed = len(sources), machine.address(operands[0]), "trans" in parts

    def go(state: State, guard: Guard) -> None:
        if guard is not None:
            raise PTXError("stmatrix under a predicate")
        offsets = where(state).astype(np.int64)
        warps = len(offsets) // 32
        rows = np.zeros((warps, count, 8, 8), np.uint16)
        lane = np.arange(32)
        row, column = lane // 4, 2 * (lane % 4)
        for index, source in enumerate(sources):
            pair = machine.spread(state, source(state)).reshape(warps, 32)
            for half in (0, 1):
                value = (pair >> np.uint32(16 * half)).astype(np.uint16)
                if transposed:
                    rows[:, index, column + half, row] = value
                else:
                    rows[:, index, row, column + half] = value
        active = np.nonzero(np.arange(len(offsets)) % 32 < 8 * count)[0]
        values: Array = rows.reshape(warps * count * 8, 8).view(np.uint8).reshape(-1, 16)
        state.shared.store(offsets[active], values, machine.lanes(active))

    return go


HANDLERS: dict[str, Handler] = {
    "atom": atomic,
    "bar": barrier,
    "barrier": barrier,
    "bra": branch,
    "cp": copy_async,
    "createpolicy": cache_policy,
    "exit": finish,
    "fence": fence,
    "ld": load,
    "ldmatrix": load_matrices,
    "membar": fence,
    "red": atomic,
    "ret": finish,
    "shfl": shuffle,
    "st": store,
    "stmatrix": store_matrices,
}
