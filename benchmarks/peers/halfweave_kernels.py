"""halfweave's products of one shape, weights out of the caches: - THREADS."""

from __future__ import annotations

import time
from ctypes import byref
from typing import Any

import torch
from halfweave import __version__
from halfweave.kernels.cpu.bandwidth import read_bandwidth
from halfweave.kernels.cpu.library import library
from halfweave.kernels.cpu.packed import PackedWeight, pack_weight
from halfweave.kernels.cpu.room import Room
from halfweave.kernels.formats import Dense, Int4, PackedLinear, Sparse24, Sparse24Int4
from worker import serve

GROUP = 64


class Kernels:
    """Answers with microseconds and bytes of one product, and the read bandwidth of that moment."""

    version = __version__

    def __init__(self, _: str, threads: int) -> None:
        torch.set_num_threads(threads)
        native = library()
        if native is None:
            raise RuntimeError("the CPU kernels are not installed")
        self._native = native
        self._made: dict[tuple[str, int, int, int], list[PackedWeight]] = {}

    def answer(self, ask: dict[str, Any], salt: int) -> dict[str, Any]:
        """One product with each of `copies` equal weights [N, K] in turn; the mean of them."""
        weights = self._weights(ask["format"], ask["N"], ask["K"], ask["copies"])
        x, y = torch.randn(ask["M"], ask["K"]), torch.empty(ask["M"], ask["N"])
        native = self._native
        level, pool, multiply = native.level_pointer, native.pool, native.functions.hw_linear
        pointers = x.data_ptr(), ask["M"], None, y.data_ptr()
        start = time.perf_counter()
        refused = [multiply(level, pool, byref(weight.struct), *pointers) for weight in weights]
        seconds = (time.perf_counter() - start) / len(weights)
        if any(refused):
            raise RuntimeError(f"a product was refused: {refused}")
        read = read_bandwidth(native) / 1e9
        return {"us": 1e6 * seconds, "bytes": weights[0].struct.bytes, "read_gb_per_s": read}

    def _weights(self, kind: str, rows: int, columns: int, copies: int) -> list[PackedWeight]:
        key = (kind, rows, columns, copies)
        if key not in self._made:
            self._made.clear()  # one shape at a time: they are large
            made = example(kind, rows, columns)
            room = Room()  # as a decoder's weights lie
            self._made[key] = [pack_weight(self._native, made, room) for _ in range(copies)]
        return self._made[key]


def example(kind: str, rows: int, columns: int) -> PackedLinear:
    """A random weight; what the values are makes no difference to the time."""
    weight = torch.randn(rows, columns).bfloat16()
    if kind == "dense bf16":
        return Dense(weight)
    codes = torch.randint(-8, 8, (rows, columns))
    scale = torch.full((rows, -(-columns // GROUP)), 0.01).half()
    if kind == "int4 g64":
        return Int4.from_codes(codes, scale, GROUP)
    chosen = torch.rand(rows, columns // 4, 4).topk(2, dim=-1).indices
    keep = (
        torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, chosen, True).flatten(1)
    )
    if kind == "2:4 bf16":
        return Sparse24.from_dense(torch.where(keep, weight, 0))
    return Sparse24Int4.from_codes(codes, keep, scale, GROUP)


serve(Kernels)
