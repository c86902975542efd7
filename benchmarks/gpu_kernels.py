"""Times the GPU operators against torch's dense product, on a real device.

    python benchmarks/gpu_kernels.py --results docs/results

A product is timed by CUDA events around a CUDA graph that multiplies by copies of the weight in
turn, so many that the cache does not hold them, or as many as a model has blocks. Interleaved: in
every round each format is replayed once. Writes gpu_measured.json: medians and spread in
microseconds, with the card and the versions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from halfweave.bench.kernel_gpu import graph_timer, in_turns
from halfweave.kernels.cuda.binding import bind
from halfweave.kernels.formats import Int4, PackedLinear, Sparse24, Sparse24Int4
from torch import Tensor
from torch.nn import functional

DEVICE, DTYPE, GROUP = torch.device("cuda"), torch.bfloat16, 64
SHAPES = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (960, 576),
    (576, 1536),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 7
_BYTES_READ = 256 * 2**20  # several times any card's second-level cache
_MOST_COPIES = 32
Product = Callable[[Tensor], Tensor]


def products(rows: int, columns: int) -> dict[str, list[Product]]:
    """Copies of one random weight in every format, by name, with the bytes of each."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, device=DEVICE) * 0.02
    fours = weight.view(rows, columns // 4, 4)
    keep = torch.zeros_like(fours, dtype=torch.bool)
    keep = keep.scatter_(2, fours.abs().topk(2).indices, True).view(rows, columns)
    codes = torch.randint(-8, 8, weight.shape, device=DEVICE)
    scale = torch.full((rows, columns // GROUP), 0.004, dtype=torch.float16, device=DEVICE)
    dense = (weight * keep).to(DTYPE)
    packed: dict[str, PackedLinear] = {
        "sparse24": Sparse24.from_dense(dense),
        "int4": Int4.from_codes(codes, scale, GROUP),
        "sparse24_int4": Sparse24Int4.from_codes(codes, keep, scale, GROUP),
    }
    return {
        "dense": copied(dense.nbytes, lambda: _dense(dense.clone())),
        **_of_torch(dense),
        # Binding repacks a weight, which copies it.
        **{
            name: copied(each.nbytes, lambda each=each: bind(each, None, DEVICE, DTYPE))
            for name, each in packed.items()
        },
    }


def copied(size: int, make: Callable[[], Product]) -> list[Product]:
    """So many copies that they do not stay in the cache."""
    return [make() for _ in range(min(_MOST_COPIES, _BYTES_READ // size + 1))]


def _dense(weight: Tensor) -> Product:
    return lambda x: functional.linear(x, weight)


def _of_torch(weight: Tensor) -> dict[str, list[Product]]:
    """torch's own 2:4 product (cuSPARSELt or CUTLASS); nothing where this build has none."""
    try:
        made = copied(
            weight.nbytes * 9 // 16,
            lambda: _dense(torch.sparse.to_sparse_semi_structured(weight.clone())),
        )
        made[0](weight.new_zeros(8, weight.shape[1]))
    except (RuntimeError, NotImplementedError) as error:
        print(f"torch's own 2:4 product is left out: {error}", file=sys.stderr)
        return {}
    return {"torch sparse24": made}


def measure(rows: int, columns: int) -> list[dict[str, Any]]:
    """All formats and batches of one shape."""
    found, every = [], products(rows, columns)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, dtype=DTYPE, device=DEVICE)
        timers = {
            name: graph_timer([partial(copy, x) for copy in copies])
            for name, copies in every.items()
        }
        times = in_turns(timers, ROUNDS)
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
                    "to_dense": median(times["dense"]) / median(own),
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
        "command": "python benchmarks/gpu_kernels.py",
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "dtype": str(DTYPE).removeprefix("torch."),
        "group": GROUP,
        "rows": rows,
    }
    path = options.results / "gpu_measured.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
