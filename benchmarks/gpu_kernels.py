"""Times the GPU operators against torch's dense product, on a real device.

    python benchmarks/gpu_kernels.py --results docs/results

Interleaved: in every round each product is timed once in each format, by CUDA events around some
calls in a CUDA graph, weights out of the cache. Writes gpu_measured.json: medians and spread,
microseconds, with the card and the versions. Says so and stops where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from halfweave.kernels.cuda.binding import bind
from halfweave.kernels.formats import Int4, Sparse24, Sparse24Int4
from torch import Tensor
from torch.nn import functional

DEVICE, DTYPE = torch.device("cuda"), torch.float16
SHAPES = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (960, 576),
    (576, 1536),
)
TOKENS = (1, 8, 16, 32, 64, 128, 512)
ROUNDS, CALLS = 7, 20
_CACHE_BYTES = 256 * 2**20  # more than any card's second-level cache
Product = Callable[[Tensor], Tensor]


def products(rows: int, columns: int) -> dict[str, Product]:
    """The formats of one random weight, by name."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    keep = torch.zeros(rows, columns // 4, 4, dtype=torch.bool)
    keep.scatter_(2, weight.abs().view(rows, columns // 4, 4).topk(2).indices, True)
    keep = keep.view(rows, columns)
    codes = torch.randint(-8, 8, weight.shape, generator=generator)
    scale = torch.full((rows, columns // 64), 0.004, dtype=torch.float16)
    dense = weight.to(DEVICE, DTYPE)
    sparse = Sparse24.from_dense((weight * keep).half())
    joint = Sparse24Int4.from_codes(codes, keep, scale, 64)
    return {
        # Also what a 2:4 weight costs that is expanded once, when it is loaded.
        "dense": lambda x: functional.linear(x, dense),
        **_of_torch(dense * keep.to(DEVICE)),
        "sparse24": bind(sparse, None, DEVICE, DTYPE),
        "sparse24_int4": bind(joint, None, DEVICE, DTYPE),
        "int4": bind(Int4.from_codes(codes, scale, 64), None, DEVICE, DTYPE),
    }


def _of_torch(weight: Tensor) -> dict[str, Product]:
    """torch's own 2:4 product (cuSPARSELt or CUTLASS); nothing where this build has none."""
    try:
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        functional.linear(weight.new_zeros(8, weight.shape[1]), sparse)
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch's own 2:4 product is left out: {error}", file=sys.stderr)
        return {}
    return {"torch sparse24": lambda x: functional.linear(x, sparse)}


def seconds(product: Product, x: Tensor) -> float:
    """Of one call, from a graph of some; between them the cache is filled with other bytes."""
    other = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=DEVICE)
    product(x)
    graph, filling = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            other.zero_()
            product(x)
    with torch.cuda.graph(filling):
        for _ in range(CALLS):
            other.zero_()
    return max(_replayed(graph) - _replayed(filling), 0.0) / CALLS


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(rows: int, columns: int) -> list[dict[str, Any]]:
    """All formats and batches of one shape."""
    found = []
    every = products(rows, columns)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, dtype=DTYPE, device=DEVICE)
        times: dict[str, list[float]] = {name: [] for name in every}
        for _ in range(ROUNDS):
            for name, product in every.items():
                times[name].append(1e6 * seconds(product, x))
        for name, own in times.items():
            found.append(
                {
                    "format": name,
                    "M": tokens,
                    "N": rows,
                    "K": columns,
                    "us": median(own),
                    "least_us": min(own),
                    "greatest_us": max(own),
                    "to_dense": median(times["dense"]) / median(own) if median(own) else None,
                }
            )
    return found


def main() -> None:
    """Measure every shape and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing to measure")
    rows = []
    for shape in SHAPES:
        rows += measure(*shape)
        print(f"{shape[0]} x {shape[1]}", file=sys.stderr, flush=True)
    document = {
        "date": str(date.today()),
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": rows,
    }
    path = options.results / "gpu_measured.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
