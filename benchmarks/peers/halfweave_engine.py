"""halfweave's own decoder, without the engine around it: MODEL THREADS."""

from __future__ import annotations

import time

import torch
from halfweave import __version__
from halfweave.kernels.paging import PAGE_POSITIONS
from halfweave.runtime.model import load_model
from worker import Engine, serve


class Halfweave(Engine):
    """The fused decoder, called as the engine calls it."""

    version = __version__
    batches = True
    head_bits = 8

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._decoder = load_model(path, verify=False, head_bits=self.head_bits).decoder

    def prefill(self, ids: list[int]) -> float:
        cache = self._decoder.new_cache()
        known = torch.tensor(ids) % self._decoder.spec.vocab
        start = time.perf_counter()
        hidden = self._decoder.forward(known, cache)
        self._decoder.logits(hidden[-1:]).numpy().argmax()
        return time.perf_counter() - start

    def decode(self, depth: int, count: int, batch: int) -> float:
        native = self._decoder.native
        pages_each = -(-(depth + count + 1) // PAGE_POSITIONS)
        pages = torch.arange(batch * pages_each, dtype=torch.int32)
        starts = pages[::pages_each].long()
        memory = torch.zeros(len(pages) * native.page_bytes, dtype=torch.uint8)
        ids = torch.arange(batch, dtype=torch.int32) + 100
        for position in range(depth):
            native.forward(ids, torch.full((batch,), position), pages, starts, memory)
        start = time.perf_counter()
        for position in range(depth, depth + count):
            hidden = native.forward(ids, torch.full((batch,), position), pages, starts, memory)
            ids = torch.from_numpy(native.logits(hidden).numpy().argmax(-1).astype("int32"))
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(Halfweave)
