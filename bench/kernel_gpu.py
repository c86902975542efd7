"""Every packed product of a model on a GPU, by each tile that could serve it, beside dense ones.

Times are of CUDA graphs that multiply by copies of the weight in turns, so many that no cache holds
them, or 512 of a small one. What launching costs is left out, as it is where the decoder replays
its steps, and so is adding up what K was parted into, where the next kernel does that. What is the
fastest tile for so many tokens is kept for when the model runs there (kernels/cuda/choices.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from triton import OutOfResources

from ..errors import RefusedError
from ..kernels.cuda.binding import LinearFunction, SparseLinear
from ..kernels.cuda.choices import limits_of, stored
from ..kernels.cuda.fragments import FragmentWeight
from ..kernels.cuda.linear import COLUMNS_MULTIPLE, multiply, multiply_in_parts, product_of
from ..kernels.cuda.targets import Architecture
from ..kernels.cuda.variants import Product as GpuProduct
from ..kernels.cuda.variants import candidates
from ..kernels.formats import Int4, PackedLinear, Sparse24, Sparse24Int4
from ..kernels.measured import Measured, Product
from ..runtime.checkpoint import Checkpoint
from ..runtime.model import gpu_dtype
from .kernel import KernelPlan, KernelResult, KernelRow, Other, is_slower
from .products import ModelProduct, gpu_products
from .progress import Progress, silent
from .stats import Spread

DENSE, DENSE_24 = "torch-dense", "torch-sparse24"
_READ_BYTES = 2**30
_COLD_BYTES = 256 * 2**20  # several times any card's second-level cache
_MOST_COPIES = 512  # launches in a graph; of a tiny weight it would be tens of thousands

_Copy = TypeVar("_Copy")
# Computes one product with one copy of the weight.
Run = Callable[[], Tensor]
# From the runs of all copies, microseconds of one of them each time it is called.
Timer = Callable[[Sequence[Run]], Callable[[], float]]


@dataclass(frozen=True)
class Gpu:
    """Where to measure: with what limits, and by which clock.

    A timer raises RuntimeError or Triton's OutOfResources for what the device cannot do.
    """

    device: torch.device
    arch: Architecture
    timer: Timer

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """A GPU that is there.

        Raises:
            RefusedError: it has no sparse tensor cores that are known here.
        """
        found = limits_of(_number(device))
        if found is None:
            raise RefusedError(f"{device} has no sparse tensor cores: there is nothing to choose")
        return cls(device, found[0], graph_timer)

    @property
    def number(self) -> int:
        """The device's own."""
        return _number(self.device)


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def graph_timer(runs: Sequence[Run]) -> Callable[[], float]:
    """By events around a graph of all runs, on the current GPU."""
    aside = _capture_stream(torch.cuda.current_device())
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        runs[0]()  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        for run in runs:
            run()

    def microseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / len(runs)

    return microseconds


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all timers of a GPU: torch's libraries keep room for every stream they see."""
    return torch.cuda.Stream(device)


def in_turns(timers: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """What each timer says, A B A B, after a turn that warms up."""
    for timer in timers.values():
        timer()
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repetitions):
        for name, timer in timers.items():
            samples[name].append(timer())
    return samples


@dataclass(frozen=True)
class GpuKernelResult(KernelResult):
    """As of a CPU; a row's `kernel` is a tile by name, and `us` is its time."""

    tiles: tuple[tuple[Product, Measured], ...] = ()

    def body(self) -> dict[str, Any]:
        """As of a CPU, but for how memory was read."""
        return {**super().body(), "read_how": "1 GiB of fp32 summed up by torch; the best of all"}

    def table(self) -> dict[Product, list[Measured]]:
        """What the choice of tiles has to know."""
        found: dict[Product, list[Measured]] = {}
        for product, measured in self.tiles:
            found.setdefault(product, []).append(measured)
        return found


@dataclass(frozen=True)
class _Way:
    """One way to compute, with several copies of the weight; `ours` is a tile of our kernel."""

    name: str
    ours: bool
    copies: Sequence[LinearFunction]


def bench_gpu(
    path: str, gpu: Gpu, plan: KernelPlan | None = None, progress: Progress | None = None
) -> GpuKernelResult:
    """Measure all packed products of a model directory.

    Raises:
        RefusedError: the model has none, or as `Checkpoint.open`.
    """
    with torch.cuda.device(gpu.number) if gpu.device.type == "cuda" else nullcontext():
        return _bench(path, gpu, plan or KernelPlan(), progress or silent)


def _bench(path: str, gpu: Gpu, plan: KernelPlan, tell: Progress) -> GpuKernelResult:
    checkpoint = Checkpoint.open(path, verify=False)
    products, dtype = gpu_products(checkpoint), gpu_dtype(checkpoint)
    reads, rows, tiles, notes = [_bytes_per_s(gpu)], [], [], dict[str, None]()
    for number, each in enumerate(products):
        weight = each.weight().to(gpu.device)
        subject = _Subject.of(each, weight, dtype, gpu)
        notes |= dict.fromkeys(subject.notes)
        for turn, tokens in enumerate(plan.tokens):
            row, measured, left_out = subject.measured(tokens, plan.repetitions)
            rows.append(row)
            tiles.append(measured)
            notes |= dict.fromkeys(left_out)
            done, total = number * len(plan.tokens) + turn + 1, len(products) * len(plan.tokens)
            tell(done, total, f"{row.format} {row.N}x{row.K} of {tokens}")
        reads.append(_bytes_per_s(gpu))
    best = max(reads)
    return GpuKernelResult(
        tuple(replace(row, bandwidth_share=1e9 * row.gb_per_s / best) for row in rows),
        best / 1e9,
        tuple(read / 1e9 for read in reads),
        f"sparse tensor cores, {str(dtype).rpartition('.')[2]}",
        tuple(notes),
        tuple(tiles),
    )


@dataclass(frozen=True)
class _Subject:
    """A weight on the GPU, in fragment order and in the others' ways."""

    each: ModelProduct
    weight: PackedLinear
    linear: SparseLinear
    copies: Sequence[FragmentWeight]
    others: Sequence[_Way]
    notes: Sequence[str]
    dtype: torch.dtype
    gpu: Gpu

    @classmethod
    def of(cls, each: ModelProduct, weight: PackedLinear, dtype: torch.dtype, gpu: Gpu) -> _Subject:
        assert isinstance(weight, Sparse24 | Sparse24Int4 | Int4)
        linear = SparseLinear.of(weight, None, gpu.device, dtype)
        copies = _copied(linear.weight.nbytes, linear.weight.copy)
        others, notes = _others(weight, dtype)
        return cls(each, weight, linear, copies, others, notes, dtype, gpu)

    def measured(
        self, tokens: int, repetitions: int
    ) -> tuple[KernelRow, tuple[Product, Measured], list[str]]:
        """The row of so many tokens, what to remember of it, and notes; all ways take turns.

        Raises:
            RefusedError: no tile can be timed, or the dense product cannot.
        """
        x = self._inputs(tokens)
        product = product_of(x, self.linear.weight, self.linear.rows)
        ways = {way.name: way for way in (*self._tiles(product), *self.others)}
        timers, notes = self._timers(ways.values(), x)
        samples = in_turns(timers, repetitions)
        times = {name: median(each) for name, each in samples.items() if ways[name].ours}
        best = min(times, key=times.__getitem__)
        error = self._error(x, ways[best].copies[0])
        row = self._row(x, best, error, {name: tuple(each) for name, each in samples.items()})
        return row, (stored(product), Measured(tokens, best, best, times)), notes

    def _timers(
        self, ways: Iterable[_Way], x: Tensor
    ) -> tuple[dict[str, Callable[[], float]], list[str]]:
        """Of all ways that this device has room for."""
        timers, notes = {}, []
        for way in ways:
            try:
                timers[way.name] = self.gpu.timer([partial(copy, x) for copy in way.copies])
            except (RuntimeError, NotImplementedError, OutOfResources) as error:
                why = (str(error) or type(error).__name__).splitlines()[0]
                notes.append(f"{way.name} of {len(x)} tokens was left out: {why}")
        if DENSE not in timers or not any(way.ours and way.name in timers for way in ways):
            raise RefusedError(f"a product of {len(x)} tokens cannot be timed: {notes[0]}")
        return timers, notes

    def _inputs(self, tokens: int) -> Tensor:
        """[tokens, K], filled up with zeros as the kernels want them, always the same."""
        columns = self.weight.shape[1]
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, columns, generator=generator)
        return functional.pad(x, (0, -columns % COLUMNS_MULTIPLE)).to(self.gpu.device, self.dtype)

    def _tiles(self, product: GpuProduct) -> list[_Way]:
        rows, columns = self.weight.shape
        whole = rows == self.linear.rows and columns % COLUMNS_MULTIPLE == 0
        by = multiply_in_parts if self.each.in_parts and whole else multiply
        return [
            _Way(
                choice.name,
                True,
                [partial(by, weight=w, rows=self.linear.rows, chosen=choice) for w in self.copies],
            )
            for choice in candidates(product, self.gpu.arch)
        ]

    def _row(
        self, x: Tensor, best: str, error: float, samples: Mapping[str, tuple[float, ...]]
    ) -> KernelRow:
        product, ours = self.each.product, samples[best]
        us, dense = Spread.of(ours), samples[DENSE]
        gone = 2 * len(x) * product.N * product.K
        return KernelRow(
            **asdict(product),
            M=len(x),
            count=self.each.count,
            rounded_head=False,
            kernel=best,
            us=us,
            gb_per_s=self.linear.weight.nbytes / us.median / 1e3,
            bandwidth_share=0.0,
            gflop_per_s=gone / us.median / 1e3,
            to_dense=median(dense) / us.median,
            to_int4=None,
            wins=not is_slower(ours, dense),
            error=error,
            samples_us=ours,
            others={
                name: Other(Spread.of(each), each) for name, each in samples.items() if name != best
            },
        )

    def _error(self, x: Tensor, ours: LinearFunction) -> float:
        rows, columns = self.weight.shape
        wanted = x[:, :columns].float() @ self.weight.unpack().T
        y = ours(x).float()
        got = (y if y.ndim == x.ndim else y.sum(0))[:, :rows]  # parts are still to be added
        norm = float(wanted.norm())
        return float((got - wanted).norm()) / norm if norm else 0.0


def _others(weight: PackedLinear, dtype: torch.dtype) -> tuple[list[_Way], list[str]]:
    """torch's dense product, and its own 2:4 one where it has one; and what it said if not."""
    columns = weight.shape[1]
    dense = functional.pad(weight.unpack(dtype), (0, -columns % COLUMNS_MULTIPLE))
    ways = [_Way(DENSE, False, _copied(dense.nbytes, lambda: _by(dense.clone())))]
    if not isinstance(weight, Sparse24 | Sparse24Int4):
        return ways, []
    try:
        made = _copied(
            dense.nbytes * 9 // 16,
            lambda: _by(torch.sparse.to_sparse_semi_structured(dense.clone())),
        )
        made[0](dense.new_zeros(8, dense.shape[1]))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return ways, [f"torch's own 2:4 product is left out: {str(error).splitlines()[0]}"]
    return [*ways, _Way(DENSE_24, False, made)], []


def _by(weight: Tensor) -> LinearFunction:
    return lambda x: functional.linear(x, weight)


def _copied(nbytes: int, make: Callable[[], _Copy]) -> list[_Copy]:
    """So many that they do not stay in the cache, where that is not too many."""
    return [make() for _ in range(min(_MOST_COPIES, _COLD_BYTES // nbytes + 1))]


def _bytes_per_s(gpu: Gpu) -> float:
    """How fast memory is read."""
    room = torch.ones(_READ_BYTES // 4, device=gpu.device)
    timer = gpu.timer([room.sum])
    return _READ_BYTES / min(timer() for _ in range(5)) * 1e6
