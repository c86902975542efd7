"""mma.sync.m16n8k16 and mma.sp.m16n8k32, fp16 and bf16 with fp32 sums.

g = lane / 4, t = lane % 4. A, 16 rows: registers 0 and 2 hold row g, 1 and 3 row g + 8; registers 0
and 1 columns 2t and 2t + 1, registers 2 and 3 the same eight further. B: register r holds rows
8r + 2t and the next, column g. D: 0 and 1 row g, columns 2t and 2t + 1; 2 and 3 row g + 8.

With mma.sp, A's columns are those that were kept of 32. The lanes of a quad's pair `selector` hold
which: lane h of the pair those of columns 16h and on, its low 16 bits for row g, its high ones for
row g + 8; four bits for every four columns, the first kept position in the lower two.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import Handler, Parts
from .machine import Guard, Machine, Reader, State, Step, vector
from .numbers import Array, PTXError, bfloat_to_float

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def multiply(machine: Machine, parts: Parts, operands: Parts) -> Step:
    """D = A B + C for every warp."""
    sparse = parts[1].startswith("sp")
    shape, kinds = next(part for part in parts if part.startswith("m16")), parts[-4:]
    if (shape, sparse) not in (("m16n8k16", False), ("m16n8k32", True)):
        raise PTXError(f"a matrix product of {shape}")
    if kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] not in ("f16", "bf16"):
        raise PTXError(f"a matrix product of {kinds}")
    names = [vector(operand) for operand in operands]
    outputs = [machine.write(each) for each in names[0]]
    a, b = ([machine.read(each, "u32") for each in group] for group in names[1:3])
    c = [machine.read(each, "f32") for each in names[3]]
    metadata = machine.read(names[4][0], "u32") if sparse else None
    selector = int(operands[5], 0) if sparse else 0
    bfloat = kinds[1] == "bf16"

    def go(state: State, guard: Guard) -> None:
        if guard is not None:
            raise PTXError("a matrix product under a predicate")
        left = _left(_halves(machine, state, a, bfloat))
        if metadata is not None:
            words = machine.spread(state, metadata(state)).reshape(-1, 8, 4)
            left = _spread(left, words[:, :, 2 * selector : 2 * selector + 2])
        product = np.matmul(left, _right(_halves(machine, state, b, bfloat)))
        for index, put in enumerate(outputs):
            own = product[:, _G + 8 * (index // 2), 2 * _T + index % 2]
            before = machine.spread(state, c[index](state)).reshape(-1, 32)
            put(state, (before + own).astype(np.float32).reshape(-1), None)

    return go


def _halves(machine: Machine, state: State, registers: list[Reader], bfloat: bool) -> Array:
    """fp32 [warps, 32, 2 * registers]."""
    words = np.stack([machine.spread(state, each(state)) for each in registers], 1)
    halves = words.view(np.uint16)
    values = bfloat_to_float(halves) if bfloat else halves.view(np.float16).astype(np.float32)
    return values.reshape(machine.size(state) // 32, 32, -1)


def _left(values: Array) -> Array:
    """A [warps, 16, 16] from its eight values a lane."""
    matrix = np.zeros((len(values), 16, 16), np.float32)
    for index in range(8):
        matrix[:, _G + 8 * (index // 2 % 2), 2 * _T + index % 2 + 8 * (index // 4)] = values[
            :, :, index
        ]
    return matrix


def _right(values: Array) -> Array:
    """B [warps, 8 * registers, 8]."""
    matrix = np.zeros((len(values), 4 * values.shape[2], 8), np.float32)
    for index in range(values.shape[2]):
        matrix[:, 2 * _T + index % 2 + 8 * (index // 2), _G] = values[:, :, index]
    return matrix


def _spread(kept: Array, words: Array) -> Array:
    """A [warps, 16, 32] from its kept columns; `words` [warps, g, which half of the columns]."""
    halves = words[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    rows = halves.transpose(0, 3, 1, 2).reshape(-1, 16, 2)  # warp, row, half of the columns
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(2)
    positions = (rows[..., None] >> shifts & np.uint32(3)).reshape(-1, 16, 8, 2).astype(int)
    if (positions[..., 0] >= positions[..., 1]).any():
        raise PTXError("metadata whose positions do not increase")
    full = np.zeros((len(kept), 16, 8, 4), np.float32)
    np.put_along_axis(full, positions, kept.reshape(-1, 16, 8, 2), 3)
    return full.reshape(-1, 16, 32)


HANDLERS: dict[str, Handler] = {"mma": multiply}
