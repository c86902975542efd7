"""Which tile a product gets on the GPU that is there: what was measured, or else the rule's.

`halfweave bench MODEL kernel --device cuda` measures (kernels/measured.py keeps it). What it found
is looked up once for each product; a process goes on with what it found first.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton

from ..formats import Int4, Sparse24, Sparse24Int4
from ..measured import Device, Table, find_table
from ..measured import Product as Stored
from .targets import ARCHITECTURES, Architecture
from .variants import Choice, Product, candidates, choose, tokens_held

_REMEMBERED = 4096
_NEAR = 2.5  # times as many tokens is too far for a measurement to speak
_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


@cache
def limits_of(device: int) -> tuple[Architecture, int] | None:
    """A GPU's limits and multiprocessors; None where it has no mma.sp that these kernels know."""
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    known = ARCHITECTURES.get(arch)
    return None if known is None else (known, properties.multi_processor_count)


@cache
def gpu_device(device: int) -> Device:
    """The GPU with these kernels' sources and the compiler of them."""
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return Device(torch.cuda.get_device_name(device), digest.hexdigest())


@lru_cache(_REMEMBERED)
def choice_on(device: int, product: Product) -> Choice:
    """The tile of a product on the GPU of that number."""
    found = limits_of(device)
    if found is None:
        raise NotImplementedError("this GPU has no sparse tensor cores that are known here")
    measured = fastest(product, find_table(gpu_device(device)), found[0])
    return measured or choose(product, *found)


def fastest(product: Product, table: Table | None, arch: Architecture) -> Choice | None:
    """What a table says of a product: of as many tokens, or about as many with the same tiles.

    None where it says nothing of those, or names what there is not.
    """
    rows = () if table is None else table.rows.get(stored(product), ())
    apart = {
        max(row.M, product.M) / max(1, min(row.M, product.M)): row.choice
        for row in rows
        if tokens_held(row.M) == tokens_held(product.M)
    }
    nearest = min(apart, default=_NEAR)
    if nearest >= _NEAR:
        return None
    named = {choice.name: choice for choice in candidates(product, arch)}
    return named.get(apart[nearest])


def stored(product: Product) -> Stored:
    """The product as tables know it: rows filled up, and groups, as fragments have them."""
    if product.dense:
        return Stored(Int4.kind, product.group, None, product.N, product.K // 2)
    if product.group:
        return Stored(Sparse24Int4.kind, product.group, None, product.N, product.K)
    return Stored(Sparse24.kind, None, _DTYPES[product.kind], product.N, product.K)
