"""Bytes of the weight files that a choice of formats leads to, headers included, never too few."""

from __future__ import annotations

import json
from math import prod

import torch

from ...kernels.formats import Int4, Sparse24, Sparse24Int4, expected_tensors, needs_group
from ..source import Source

# The formats that take a solver: only their candidates are kept on the disk.
SOLVED = (Sparse24Int4.kind, Int4.kind)
# Of each file: the header's length, its braces and metadata, and up to 7 spaces that align it.
_PER_FILE = 8 + len('{"__metadata__":{"format":"pt"},}') + 7


def bytes_before(source: Source) -> int:
    """Of the dense model's weight files as they are."""
    return sum(file.stat().st_size for file in source.tensors.files)


def bytes_that_stay(source: Source) -> int:
    """Of everything but the prunable linears, in one file per block and one for the rest."""
    linears = {
        f"{name}.weight" for i in range(source.block_count) for name in source.linear_names(i)
    }
    stay = [name for name in source.tensors.names() if name not in linears]
    return (source.block_count + 1) * _PER_FILE + sum(
        _tensor_bytes(source, name, source.tensors.shape(name), source.tensors.dtype(name))
        for name in stay
    )


def stored_bytes(source: Source, linear: str, kind: str, group: int) -> int:
    """Of one linear's tensors in the format `kind`, with their entries in a file's header."""
    wide = source.tensors.dtype(f"{linear}.weight")
    shapes = expected_tensors(
        kind, source.linear_shape(linear), group if needs_group(kind) else None
    )
    total = 0
    for suffix, shape in shapes.items():
        keeps_dtype = suffix == "weight" or (suffix == "values" and kind == Sparse24.kind)
        narrow = torch.float16 if suffix == "scale" else torch.uint8
        dtype = wide if keeps_dtype else narrow
        total += _tensor_bytes(source, f"{linear}.{suffix}", shape, dtype)
    return total


def _tensor_bytes(source: Source, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """A tensor and its header entry; offsets as long as they can get in any of the files."""
    far = bytes_before(source)
    entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [far, far]}
    text = json.dumps({name: entry}, separators=(",", ":"))
    return prod(shape) * dtype.itemsize + len(text) - 2 + 1
