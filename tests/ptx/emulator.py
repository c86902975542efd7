"""Runs the PTX of one kernel on a CPU, for tests: what Triton and Gluon emit for sm_80 and later.

    kernel = Emulator(ptx, shared_bytes)
    x, y = kernel.memory.put(array), kernel.memory.put(numpy.zeros(...))
    kernel.run((8, 1, 1), [x, y, 5])
    kernel.memory.get(y)

An instruction that it does not know is an error, never a guess. Checked on the way: bounds and
alignment; reads of data in flight or never written; races of warps between two barriers. Branches
must be uniform within a block; blocks that disagree run on separately. Not modelled: time, caches,
races between blocks or between the lanes of a warp, denormals that a GPU may flush, and the order
in which a tensor core adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from . import access, arithmetic, tensor_cores
from .access import RETURN
from .machine import Copy, Machine, State, Step
from .memory import GlobalMemory
from .numbers import UNSIGNED, Array, PTXError
from .program import Instruction, Program, parse
from .shared import Lanes, SharedMemory

HANDLERS = {**arithmetic.HANDLERS, **access.HANDLERS, **tensor_cores.HANDLERS}
_MOST_SHARED_BYTES = 232448  # of a block on sm_90
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # along each axis of a grid, of every card
_BLOCKS_TOGETHER = 64
_DETAILED = ("mma", "ldmatrix", "ld", "st", "cp")  # counted by their modifiers too


class Emulator:
    """One kernel. `checks` off leaves races and unwritten words unseen."""

    def __init__(
        self, ptx: str, shared_bytes: int = _MOST_SHARED_BYTES, checks: bool = True
    ) -> None:
        """Raises PTXError for an instruction that is not known."""
        self.program: Program = parse(ptx)
        self._machine = Machine(self.program)
        self._shared_bytes, self._checks = max(shared_bytes, 16), checks
        self._steps = [self._decoded(each) for each in self.program.instructions]

    @property
    def memory(self) -> GlobalMemory:
        """Where the kernel's arrays are."""
        return self._machine.memory

    @property
    def counts(self) -> dict[str, int]:
        """How often each instruction was executed."""
        return dict(self._machine.counts)

    @property
    def traffic(self) -> dict[str, tuple[int, int, int]]:
        """Requests of the first block, what they cost, and the least for so many bytes."""
        return {
            what: (int(total[0]), int(total[1]), int(total[2]))
            for what, total in self._machine.traffic.items()
        }

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[int],
        counting: bool = False,
        only: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Run all blocks, or `only` some. `arguments` are numbers; a float is given as its bits.

        Raises:
            PTXError: what PTX leaves undefined, or a grid that no card launches.
        """
        machine = self._machine
        whole = (*grid, 1, 1)[:3]
        if any(size > most for size, most in zip(whole, _MOST_BLOCKS, strict=True)):
            raise PTXError(f"no card launches a grid of {whole}")
        machine.grid, machine.counting = (whole[0], whole[1], whole[2]), counting
        given = [*arguments, *[0] * len(self.program.parameters)]
        machine.arguments = dict(zip(self.program.parameters, given, strict=False))
        # `product` makes lists of its ranges, which of most grids for `only` some are too long.
        every = () if only else product(*(range(size) for size in reversed(whole)))
        blocks = list(only) or [(x, y, z) for z, y, x in every]
        for start in range(0, len(blocks), _BLOCKS_TOGETHER):
            self._run_some(blocks[start : start + _BLOCKS_TOGETHER])

    def _decoded(self, instruction: Instruction) -> tuple[Instruction, Step, str]:
        name = instruction.parts[0]
        if name not in HANDLERS:
            raise PTXError(f"unknown instruction: {instruction.text}")
        try:
            step = HANDLERS[name](self._machine, instruction.parts, instruction.operands)
        except (KeyError, ValueError, IndexError, StopIteration) as error:
            raise PTXError(f"cannot decode: {instruction.text}") from error
        return instruction, step, ".".join(instruction.parts) if name in _DETAILED else name

    def _run_some(self, blocks: list[tuple[int, int, int]]) -> None:
        threads = len(blocks) * self.program.threads
        registers: list[Array] = [
            np.zeros(threads, bool if width == 1 else UNSIGNED[width])
            for width in self._machine.widths
        ]
        shared = SharedMemory(len(blocks), self._shared_bytes, self._checks)
        waiting = [State(registers, shared, blocks)]
        while waiting:
            self._run_on(waiting.pop(), waiting.append)

    def _run_on(self, state: State, leave: Callable[[State], None]) -> None:
        """Run to the end; blocks that go another way are left for later."""
        while state.counter < len(self._steps):
            instruction, step, key = self._steps[state.counter]
            self._machine.counts[key] += 1
            guard = None
            if instruction.guard is not None:
                guard = self._machine.guard(instruction.guard, instruction.negated)(state)
            state.counter += 1
            try:
                outcome = step(state, guard)
                if outcome == RETURN:
                    return
                if isinstance(outcome, tuple):
                    state = self._branched(state, *outcome, leave)
            except PTXError as error:
                raise PTXError(f"{error}\n  at: {instruction.text}") from None

    def _branched(
        self, state: State, target: int, guard: Array | None, leave: Callable[[State], None]
    ) -> State:
        if guard is None:
            state.counter = target
            return state
        each = guard.reshape(len(state.blocks), -1)
        goes = each[:, 0]
        if (each != goes[:, None]).any():
            raise PTXError("a branch that parts the threads of a block")
        if goes.all():
            state.counter = target
        elif goes.any():
            leave(self._part(state, ~goes, state.counter))
            return self._part(state, goes, target)
        return state

    def _part(self, state: State, chosen: Array, counter: int) -> State:
        """A state of its own for the chosen blocks."""
        threads = np.repeat(chosen, self.program.threads)
        renumbered = np.cumsum(chosen) - 1

        def cut(copies: list[Copy]) -> list[Copy]:
            found = []
            for copy in copies:
                keep = chosen[copy.lanes.blocks]
                lanes = Lanes(renumbered[copy.lanes.blocks[keep]], copy.lanes.threads[keep])
                found.append(Copy(copy.offsets[keep], copy.values[keep], lanes))
            return found

        return State(
            registers=[register[threads] for register in state.registers],
            shared=state.shared.only(chosen),
            blocks=[block for block, stays in zip(state.blocks, chosen, strict=True) if stays],
            counter=counter,
            groups=[cut(group) for group in state.groups],
            open=cut(state.open),
        )
