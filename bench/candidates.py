"""Ways to compute one product, each with enough equal weights that no cache holds them.

A token reads every weight of a model once, so a weight that was just used is never there still: the
copies take turns. Our products are timed through their C function and torch's through its own, each
called from Python once for a product.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import HalfweaveError
from ..kernels.cpu.library import Library, WeightStruct
from ..kernels.cpu.packed import PackedWeight
from ..kernels.cpu.room import Room
from .cold import cold_bytes

_BURST_S = 0.0005
_BURSTS = 9
_SAMPLE_S = 0.02  # of one with products that take long, which has fewer bursts

# Computes the product with the copy of a number, and gives y [M, N].
Run = Callable[[int], Tensor]


@dataclass
class Candidate:
    """One way to compute. `bind` takes x fp32 [M, K]; `bytes` are one weight's as it is read."""

    name: str
    bytes: int
    copies: int
    bind: Callable[[Tensor], Run]
    turn: int = 0  # which copy is next

    def output(self, x: Tensor) -> Tensor:
        """y fp32 [M, N]."""
        return self.bind(x)(0).float().clone()


class Sampler:
    """Times one candidate with one x, in bursts of so many calls that a clock can tell."""

    def __init__(self, candidate: Candidate, x: Tensor) -> None:
        """Warm up: touch every copy, and find the number of calls."""
        self.candidate, self._run = candidate, candidate.bind(x)
        self.calls = self.bursts = 1
        for copy in range(candidate.copies):
            self._run(copy)
        once = max(self.seconds(), 1e-7)
        self.calls = max(1, round(_BURST_S / once))
        self.bursts = min(_BURSTS, max(1, round(_SAMPLE_S / (self.calls * once))))

    def seconds(self) -> float:
        """Of one product: the median of bursts, since the system may interrupt some of them."""
        return statistics.median(self._burst() for _ in range(self.bursts)) / self.calls

    def _burst(self) -> float:
        run, turn, copies = self._run, self.candidate.turn, self.candidate.copies
        started = time.perf_counter()
        for _ in range(self.calls):
            run(turn)
            turn = (turn + 1) % copies
        took = time.perf_counter() - started
        self.candidate.turn = turn
        return took


def copies_of(size: int) -> int:
    """How many equal weights no cache holds."""
    return max(1, -(-cold_bytes() // size))


def native_candidate(name: str, library: Library, packed: PackedWeight) -> Candidate:
    """A packed weight by our kernel; copies of it lie as a decoder's weights do."""
    size, room = packed.struct.bytes, Room()
    weights = [_copied(packed, room) for _ in range(copies_of(size))]
    rows, columns = packed.shape
    multiply, level, pool = library.functions.hw_linear, library.level_pointer, library.pool

    def bind(x: Tensor) -> Run:
        inputs = x.to(torch.float32).contiguous()
        y = torch.empty(len(inputs), rows)
        pointers = inputs.data_ptr(), len(inputs), None, y.data_ptr()

        def run(copy: int) -> Tensor:
            if multiply(level, pool, byref(weights[copy].struct), *pointers):
                raise HalfweaveError(f"CPU kernel refused a product of {rows} x {columns}")
            return y

        # The pointers are all that the call has; what they point to must outlive it.
        run.__dict__["inputs"] = inputs
        return run

    return Candidate(name, size, len(weights), bind)


def _copied(packed: PackedWeight, room: Room) -> PackedWeight:
    data = room.take(packed.data.nbytes)
    data.copy_(packed.data)
    old = packed.struct
    struct = WeightStruct(old.kind, old.group, *packed.shape, data.data_ptr(), data.nbytes)
    return PackedWeight(packed.shape, data, struct)


def torch_candidate(name: str, weight: Tensor) -> Candidate:
    """A dense weight [N, K] by torch, in its own dtype; inputs come in it too."""
    copies = [weight, *(weight.clone() for _ in range(copies_of(weight.nbytes) - 1))]

    def bind(x: Tensor) -> Run:
        inputs = x.to(weight.dtype)
        return lambda copy: functional.linear(inputs, copies[copy])

    return Candidate(name, weight.nbytes, len(copies), bind)
