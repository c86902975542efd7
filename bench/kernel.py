"""Every product of a model by our kernel, dense and as dense int4: how fast, and which one wins.

Times are of weights that no cache holds, in turns, on all of the process's threads. GFLOP/s count a
product as dense. What wins is kept for when the model is loaded (kernels/measured.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RefusedError, UsageError
from ..kernels.cpu.bandwidth import read_bandwidth
from ..kernels.cpu.library import Library, library
from ..kernels.cpu.packed import PackedWeight, pack_weight
from ..kernels.device import available_memory_bytes
from ..kernels.dispatch import NATIVE_DENSE, expanded
from ..kernels.formats import Dense, Int4, PackedLinear
from ..kernels.groups import group_count
from ..kernels.measured import DENSE, SPARSE, Measured, Product
from ..runtime.checkpoint import Checkpoint
from .candidates import Candidate, Sampler, native_candidate, torch_candidate
from .cold import cold_bytes
from .offline_plan import LEAST_REPETITIONS
from .products import ModelProduct, model_products
from .progress import Progress, silent
from .significance import ALPHA, shift
from .stats import Spread

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
INT4 = "int4"
_INT4_GROUP = 64
_FLOOR = 0.03  # a product loses if a dense one is faster by more than this, beyond chance


@dataclass(frozen=True)
class KernelPlan:
    """Numbers of tokens to multiply at once, and how often; `device` is a kind, cpu or cuda.

    Raises:
        UsageError: a number is too small.
    """

    tokens: tuple[int, ...] = TOKENS
    repetitions: int = 11
    head_bits: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.repetitions < LEAST_REPETITIONS:
            raise UsageError(f"repetitions must be at least {LEAST_REPETITIONS}")
        if not self.tokens or min(self.tokens) < 1:
            raise UsageError("tokens must be at least 1")
        if len(set(self.tokens)) < len(self.tokens):
            raise UsageError("a number of tokens is given twice")


@dataclass(frozen=True)
class Other:
    """Another way to compute the same product, or dense int4 of the same shape."""

    us: Spread
    samples_us: tuple[float, ...]


@dataclass(frozen=True)
class KernelRow:
    """One product of M tokens. A `rounded_head` is stored as floats and rounded when it is loaded.

    `us` is of our kernel for the weight as it is stored; `to_dense` and `to_int4` are how many
    times as long the fastest dense one and dense int4 take. `kernel` is what dispatch takes:
    "sparse" for as stored, or the dense one that wins, which is where `wins` is false; a rounded
    head stays as it is. `error` is the relative error of our kernel's outputs, from rounding.
    """

    format: str
    group: int | None
    dtype: str | None
    N: int
    K: int
    M: int
    count: int
    rounded_head: bool
    kernel: str
    us: Spread
    gb_per_s: float
    bandwidth_share: float
    gflop_per_s: float
    to_dense: float
    to_int4: float | None
    wins: bool
    error: float
    samples_us: tuple[float, ...]
    others: Mapping[str, Other]


@dataclass(frozen=True)
class KernelResult:
    """All rows, in the order of the model, and the best of all measurements of memory."""

    rows: tuple[KernelRow, ...]
    read_gb_per_s: float
    read_samples_gb_per_s: tuple[float, ...]
    level: str
    notes: tuple[str, ...]

    def body(self) -> dict[str, Any]:
        """What a document has of this kind alone, raw samples included."""
        found = asdict(self)
        names = ("read_gb_per_s", "read_samples_gb_per_s", "level", "rows")
        how = "256 MiB read by all threads, the best of five, after each product; the best of all"
        return {**{name: found[name] for name in names}, "read_how": how}

    def table(self) -> dict[Product, list[Measured]]:
        """What dispatch has to know: all but a rounded head, which is never expanded."""
        found: dict[Product, list[Measured]] = {}
        for row in (row for row in self.rows if not row.rounded_head):
            product = Product(row.format, row.group, row.dtype, row.N, row.K)
            us = {SPARSE: row.us.median}
            us |= {name: each.us.median for name, each in row.others.items() if name != INT4}
            choice = SPARSE if row.wins else DENSE
            found.setdefault(product, []).append(Measured(row.M, choice, row.kernel, us))
        return found


def bench_kernel(
    path: str, plan: KernelPlan | None = None, progress: Progress | None = None
) -> KernelResult:
    """Measure all products of a model directory.

    Raises:
        RefusedError: the CPU kernels are not installed, or as `Checkpoint.open`.
    """
    plan, tell, native = plan or KernelPlan(), progress or silent, needed_library()
    products = model_products(Checkpoint.open(path, verify=False), plan.head_bits)
    rows: list[KernelRow] = []
    reads, notes = [read_bandwidth(native)], []
    for number, each in enumerate(products):
        weight = each.weight()
        candidates, left_out = _candidates(native, each, weight)
        notes += left_out
        inputs = {tokens: _inputs(tokens, each.product.K) for tokens in plan.tokens}

        def told(turn: int, number: int = number, product: Product = each.product) -> None:
            done, rounds = number * plan.repetitions + turn, len(products) * plan.repetitions
            tell(done, rounds, f"{product.format} {product.N}x{product.K}")

        samples = _samples(candidates, inputs, plan.repetitions, told)
        for tokens, x in inputs.items():
            error = _error(candidates[0], x, weight)
            rows.append(_row(each, tokens, candidates[0].bytes, samples[tokens], error))
        reads.append(read_bandwidth(native))
    best = max(reads)
    return KernelResult(
        tuple(_with_share(row, best) for row in rows),
        best / 1e9,
        tuple(read / 1e9 for read in reads),
        native.level,
        tuple(notes),
    )


def needed_library() -> Library:
    """The CPU kernels; raises RefusedError where they are not installed."""
    native = library()
    if native is None:
        raise RefusedError(
            "the CPU kernels are not installed: there is nothing to measure",
            "install a C++ compiler and then halfweave again",
        )
    return native


def _candidates(
    native: Library, each: ModelProduct, weight: PackedLinear
) -> tuple[list[Candidate], list[str]]:
    """Ours first; and what was left out for lack of memory."""
    product = each.product
    dense = weight.unpack()
    ways: dict[str, tuple[int, Callable[[str], Candidate]]] = {
        "torch-float32": (4, lambda name: torch_candidate(name, dense)),
        "torch-bfloat16": (2, lambda name: torch_candidate(name, dense.bfloat16())),
    }
    if product.format != Dense.kind:
        floats = expanded(weight)
        ways[NATIVE_DENSE] = (
            4,
            lambda name: native_candidate(name, native, pack_weight(native, floats)),
        )
    if product.format not in (Dense.kind, INT4) and each.rounded_bits is None:
        group = product.group or _INT4_GROUP
        ways[INT4] = (1, lambda name: native_candidate(name, native, _int4(native, dense, group)))
    found = [native_candidate(SPARSE, native, each.pack(native, weight))]
    notes = []
    for name, (width, make) in ways.items():
        free = available_memory_bytes()
        if free is not None and 2 * max(cold_bytes(), width * dense.numel()) > free:
            notes.append(f"{name} of {product.N}x{product.K} was left out: there is no memory")
            continue
        found.append(make(name))
    if not any(candidate.name.startswith("torch") for candidate in found):
        raise RefusedError(f"there is no memory for a dense {product.N}x{product.K} to compare")
    return found, notes


def _int4(native: Library, dense: Tensor, group: int) -> PackedWeight:
    """Codes of the same shape; what they are makes no difference to the time."""
    rows, columns = dense.shape
    codes = torch.randint(-8, 8, (rows, columns))
    scale = torch.full((rows, group_count(columns, group)), 0.01).half()
    return pack_weight(native, Int4.from_codes(codes, scale, group))


def _inputs(tokens: int, columns: int) -> Tensor:
    """fp32 [tokens, columns], always the same."""
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


def _samples(
    candidates: list[Candidate],
    inputs: Mapping[int, Tensor],
    repetitions: int,
    told: Callable[[int], None],
) -> dict[int, dict[str, tuple[float, ...]]]:
    """Microseconds by number of tokens and candidate.

    A repetition is a turn of all: what else the machine does for a second then falls on one
    repetition of many rows, and not on all repetitions of one.
    """
    samplers = {
        tokens: [Sampler(candidate, x) for candidate in candidates] for tokens, x in inputs.items()
    }
    found: dict[int, dict[str, list[float]]] = {
        tokens: {candidate.name: [] for candidate in candidates} for tokens in inputs
    }
    for turn in range(repetitions):
        for tokens, each in samplers.items():
            for sampler in each:
                found[tokens][sampler.candidate.name].append(1e6 * sampler.seconds())
        told(turn + 1)
    return {
        tokens: {name: tuple(samples) for name, samples in each.items()}
        for tokens, each in found.items()
    }


def _error(ours: Candidate, x: Tensor, weight: PackedLinear) -> float:
    wanted = torch.nn.functional.linear(x, weight.unpack())
    norm = float(wanted.norm())
    return float((ours.output(x) - wanted).norm()) / norm if norm else 0.0


def _row(
    each: ModelProduct,
    tokens: int,
    size: int,
    samples: Mapping[str, tuple[float, ...]],
    error: float,
) -> KernelRow:
    product, ours = each.product, samples[SPARSE]
    us = Spread.of(ours)
    others = {
        name: Other(Spread.of(found), found) for name, found in samples.items() if name != SPARSE
    }
    dense = {name: other for name, other in others.items() if name != INT4}
    best = min(dense, key=lambda name: dense[name].us.median)
    wins = not is_slower(ours, dense[best].samples_us)
    return KernelRow(
        **asdict(product),
        M=tokens,
        count=each.count,
        rounded_head=each.rounded_bits is not None,
        kernel=SPARSE if wins or each.rounded_bits is not None else best,
        us=us,
        gb_per_s=size / us.median / 1e3,
        bandwidth_share=0.0,
        gflop_per_s=2 * tokens * product.N * product.K / us.median / 1e3,
        to_dense=dense[best].us.median / us.median,
        to_int4=others[INT4].us.median / us.median if INT4 in others else None,
        wins=wins,
        error=error,
        samples_us=ours,
        others=others,
    )


def is_slower(ours: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether a dense product is faster than ours, by more than little and beyond chance."""
    found = shift(ours, other, _FLOOR)
    return found.ratio < 1 and found.p < ALPHA


def _with_share(row: KernelRow, read: float) -> KernelRow:
    return replace(row, bandwidth_share=1e9 * row.gb_per_s / read)
