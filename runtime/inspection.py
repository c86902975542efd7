"""What is inside a model directory, without loading it. Knows files and formats, not printing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..kernels.cpu.packed import CODED
from ..kernels.dispatch import settled
from ..kernels.formats import FORMATS, Dense
from ..kernels.measured import Product
from ..kernels.shards import ShardedTensors
from .checkpoint import Checkpoint
from .families import decoder_spec
from .roof import Roof, find_roof
from .spec import Linear


@dataclass(frozen=True)
class LinearReport:
    """One linear: how it is stored, what it cost in accuracy, and what will multiply by it."""

    name: str
    format: str
    shape: tuple[int, int]
    group: int | None
    bytes: int
    method: str | None
    relative_error: float | None
    note: str
    kernel: str
    why: str


@dataclass(frozen=True)
class Inspection:
    """A directory at a glance.

    `dense_bytes` is what the weights would take with every packed linear stored dense;
    `verified_files` counts the files whose SHA-256 was compared, None where nothing vouches; `roof`
    is what memory allows here, None without the CPU kernels.
    """

    path: str
    family: str
    linears: tuple[LinearReport, ...]
    weight_bytes: int
    dense_bytes: int
    verified_files: int | None
    recipe: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None
    roof: Roof | None

    def to_json(self) -> dict[str, Any]:
        """All of it, linear by linear."""
        roof = self.roof
        limit = {} if roof is None else {"tokens_per_second": roof.tokens_per_second}
        return {**asdict(self), "roof": roof and {**asdict(roof), **limit}}


def inspect_checkpoint(path: str | Path, verify: bool = True) -> Inspection:
    """Open a directory, check it, and describe it; with `verify`, also against its hashes.

    Raises as `Checkpoint.open`, and UnsupportedModel for an unknown architecture.
    """
    checkpoint = Checkpoint.open(path, verify)
    spec = decoder_spec(checkpoint.config)
    records = (checkpoint.manifest or {}).get("linears", {})
    linears = tuple(
        _linear(checkpoint, each, records.get(each.name, {})) for each in spec.stored_linears
    )
    # The embedding is never packed: it has the dtype of the dense model.
    item_bytes = checkpoint.tensors.dtype(f"{spec.names.embedding}.weight").itemsize
    saved = sum(
        item_bytes * prod(row.shape) - row.bytes for row in linears if row.format != Dense.kind
    )
    manifest = checkpoint.manifest
    return Inspection(
        path=str(checkpoint.path),
        family=spec.family,
        linears=linears,
        weight_bytes=checkpoint.weight_bytes,
        dense_bytes=checkpoint.weight_bytes + saved,
        verified_files=len(manifest["files"]) if manifest is not None and verify else None,
        recipe=None if manifest is None else manifest.get("recipe"),
        provenance=None if manifest is None else manifest.get("provenance"),
        roof=find_roof(checkpoint, spec),
    )


def _linear(checkpoint: Checkpoint, linear: Linear, record: Mapping[str, Any]) -> LinearReport:
    name, tensors = linear.name, checkpoint.tensors
    entry = checkpoint.linears.get(name)
    kind = Dense.kind if entry is None else entry.format
    group = None if entry is None else entry.group
    floats = f"{name}.{FORMATS[kind].suffixes[0]}"
    dtype = None if kind in CODED else str(tensors.dtype(floats)).rpartition(".")[2]
    shape = checkpoint.linear_shape(name, linear.stored.transposed)
    # Of several that are stored as one, the decoder has each by itself; this is the first's.
    choice = settled(Product(kind, group, dtype, *linear.shape))
    return LinearReport(
        name=name,
        format=kind,
        shape=shape,
        group=group,
        bytes=sum(_bytes(tensors, f"{name}.{suffix}") for suffix in FORMATS[kind].suffixes),
        method=record.get("method"),
        relative_error=record.get("relative_error"),
        note=str(record.get("note", "")),
        kernel=choice.kernel,
        why=choice.why,
    )


def _bytes(tensors: ShardedTensors, name: str) -> int:
    return prod(tensors.shape(name)) * tensors.dtype(name).itemsize
