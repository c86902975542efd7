"""Steps of one token a sequence, replayed from CUDA graphs.

A step is some hundred short kernels, which take longer to launch one by one than to run. So they
are recorded once for each of a few batch sizes, on buffers that stay where they are, and every
step fills the buffers and replays the recording of the next larger size. Rows that are left over
belong to nobody: one position in a page that no sequence has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .paged import Part

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)

Work = Callable[[], Tensor]


class StepBuffers:
    """The newest token of each sequence, on the device, and the same as it was put there last.

    `ids` and `positions` are int32 [rows]; `table` int32 [rows, most pages] lists each sequence's
    pages; `lengths` int32 [rows] counts its positions, the new one included. All are pieces of one
    tensor, so that one copy fills them.
    """

    def __init__(self, rows: int, width: int, nobody: int, device: torch.device) -> None:
        """Rows that belong to nobody, whose page is number `nobody`."""
        self._host = np.zeros(rows * (3 + width), np.int32)
        self._newest = self._host[: 3 * rows].reshape(3, rows)
        self._pages = self._host[3 * rows :].reshape(rows, width)
        self._known: list[list[int]] = [[] for _ in range(rows)]
        self._nobody = nobody
        self._device = torch.empty(rows * (3 + width), dtype=torch.int32, device=device)
        self.ids, self.positions, self.lengths = self._device[: 3 * rows].view(3, rows)
        self.table = self._device[3 * rows :].view(rows, width)
        self.fill(())

    def fill(self, parts: Sequence[Part]) -> None:
        """Put these tokens into the first rows; the rest belongs to nobody again.

        Pages behind a sequence's own are not read, whatever stands there.
        """
        for row, part in enumerate(parts):
            self._newest[:, row] = part.tokens[0], part.start, part.end
            if self._known[row] != part.pages:
                self._known[row] = list(part.pages)
                self._pages[row, : len(part.pages)] = part.pages
        for row in range(len(parts), len(self._known)):
            self._newest[:, row] = 0, 0, 1
            self._pages[row, 0], self._known[row] = self._nobody, []
        self._device.copy_(torch.from_numpy(self._host))


class StepGraphs:
    """Recordings of a decoder's step on one memory, made when they are first needed."""

    def __init__(
        self,
        step: Callable[[StepBuffers], Tensor],
        width: int,
        nobody: int,
        device: torch.device,
    ) -> None:
        """`step` gives final hidden states [rows, hidden]; sequences have `width` pages at most.

        Where there is no GPU to record on, the work is done again.
        """
        self._step, self._width, self._nobody, self._device = step, width, nobody, device
        self._recordings: dict[int, tuple[StepBuffers, Work]] = {}
        self._recorder = Recorder(device) if device.type == "cuda" else None

    def fits(self, parts: Sequence[Part]) -> bool:
        """Whether these parts are one token each, of as many sequences as there are graphs for."""
        return len(parts) <= SIZES[-1] and all(
            len(part.tokens) == 1 and len(part.pages) <= self._width for part in parts
        )

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Final hidden states [parts, hidden]."""
        size = SIZES[bisect_left(SIZES, len(parts))]
        if size not in self._recordings:
            buffers = StepBuffers(size, self._width, self._nobody, self._device)
            work = partial(self._step, buffers)
            again = work if self._recorder is None else self._recorder.recorded(work)
            self._recordings[size] = buffers, again
        buffers, again = self._recordings[size]
        buffers.fill(parts)
        # A copy: the next replay, of whatever size, writes to the same place.
        return again()[: len(parts)].clone()


class Recorder:
    """Makes CUDA graphs of work on one GPU, on a stream of its own.

    They share their memory, the results included: one is replayed at a time, and what it gave is
    copied before the next.
    """

    def __init__(self, device: torch.device) -> None:
        """Of work that is done on this GPU, the current one."""
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def recorded(self, work: Work) -> Work:
        """The work as a graph. It is done twice before, so that all kernels are compiled."""
        aside = self._stream
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream is of the first GPU that recorded; and other threads, which may be
        # other engines, go on allocating.
        with torch.cuda.graph(graph, self._pool, aside, capture_error_mode="thread_local"):
            result = work()

        def again() -> Tensor:
            graph.replay()
            return result

        return again
