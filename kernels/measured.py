"""Which kernel was measured to be the fastest for a product, on this very machine.

`halfweave bench MODEL kernel` writes such a table, one file for each device, and dispatch reads it
when a weight is prepared. Nothing depends on it: without a table, or with one that cannot be used,
the rule is what it is without measuring (dispatch.py). docs/benchmarks.md has the file's format,
which is the same for a GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, HalfweaveError
from ..files import read_json, sha256_file, write_json
from .cpu.library import FILE, Library
from .device import cpu_model
from .formats import Dense, PackedLinear, Sparse24

VARIABLE = "HALFWEAVE_DISPATCH_TABLE"
OFF = "off"
SCHEMA_VERSION = 1
SPARSE, DENSE = "sparse", "dense"  # choices: as it is stored by our kernel, or expanded before
_KEPT = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What a table holds for: hardware in words, and the build of the kernels, or its hash."""

    name: str
    build: str

    @property
    def key(self) -> str:
        """Digest of all that may change which kernel is the fastest."""
        said = json.dumps([SCHEMA_VERSION, self.name, self.build, torch.__version__])
        return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True)
class Product:
    """x W^T with a weight [N, K]: its format, columns that share a scale, and dtype of its floats.

    `group` is None for formats without a choice of it, `dtype` for those with codes.
    """

    format: str
    group: int | None
    dtype: str | None
    N: int
    K: int

    @classmethod
    def of(cls, weight: PackedLinear) -> Product:
        """The product with this weight."""
        floats = {Dense: "weight", Sparse24: "values"}.get(type(weight))
        dtype = None if floats is None else str(getattr(weight, floats).dtype).rpartition(".")[2]
        return cls(weight.kind, getattr(weight, "group", None), dtype, *weight.shape)


@dataclass(frozen=True)
class Measured:
    """M tokens at once: what is the fastest. `us` has microseconds of all that was tried.

    `choice` is sparse or dense, or for a GPU the description of a tile; `kernel` is which of `us`
    that is.
    """

    M: int
    choice: str
    kernel: str
    us: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """One device's measurements; those of a product stand in the order of M."""

    device: Device
    rows: Mapping[Product, tuple[Measured, ...]]

    def at(self, product: Product, tokens: int) -> Measured | None:
        """The row of the most tokens that are no more than these, or the first; or None."""
        return row_at(self.rows.get(product, ()), tokens)


def row_at(rows: Sequence[Measured], tokens: int) -> Measured | None:
    """As `Table.at`, for one product's rows."""
    below = [row for row in rows if tokens >= row.M]
    return below[-1] if below else next(iter(rows), None)


def cpu_device(library: Library) -> Device:
    """The CPU with the kernels' level and threads."""
    return Device(f"{cpu_model()}, {library.level}, {library.threads} threads", _build(FILE))


@cache
def _build(file: Path) -> str:
    return sha256_file(file) if file.is_file() else "none"


def table_path(device: Device) -> Path:
    """Where this user's table for a device is kept."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_home) / "halfweave" / "dispatch" / f"{device.key[:24]}.json"


def find_table(device: Device) -> Table | None:
    """The table that HALFWEAVE_DISPATCH_TABLE names, or else the one that was kept for the device.

    None if there is none, if the variable says "off", or, with one warning, if it cannot be used.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    path = Path(named) if named else table_path(device)
    try:
        stat = path.stat()
    except OSError:
        return _missing(path) if named else None
    return _read(path, (stat.st_mtime_ns, stat.st_size, stat.st_ino), device, bool(named))


@lru_cache(_KEPT)
def _missing(path: Path) -> None:
    _log.warning("%s, which %s names, is not there: kernels are chosen without it", path, VARIABLE)


@lru_cache(_KEPT)
def _read(path: Path, _stamp: tuple[int, int, int], device: Device, named: bool) -> Table | None:
    """A table that was named only has to be of the device; one that was kept, of its build too."""
    try:
        found, key = parse_table(read_json(path))
        if found.device.name != device.name or (not named and key != device.key):
            raise CheckpointError(f"it is of {found.device.name!r}, or of another build")
    except CheckpointError as error:
        _log.warning("%s is ignored, kernels are chosen without it: %s", path, error.message)
        return None
    return found


def write_table(device: Device, rows: Mapping[Product, Iterable[Measured]]) -> Path:
    """Keep measurements where `find_table` looks; what is there of others, or other M, stays.

    Raises:
        OSError: the directory cannot be written to.
        CapacityError: the disk is full.
    """
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged: dict[Product, dict[int, Measured]] = {}
    try:
        old, key = parse_table(read_json(path))
        known = old.rows if key == device.key else {}
    except HalfweaveError:
        known = {}  # there is none, or none of use
    for product, each in (*known.items(), *rows.items()):
        merged.setdefault(product, {}).update({row.M: row for row in each})
    document = {
        "schema_version": SCHEMA_VERSION,
        "key": device.key,
        "device": device.name,
        "build": device.build,
        "torch": torch.__version__,
        "rows": [
            {**asdict(product), **asdict(row), "us": dict(row.us)}
            for product, each in merged.items()
            for _, row in sorted(each.items())
        ],
    }
    write_json(path, document)
    return path


def parse_table(document: Mapping[str, Any]) -> tuple[Table, str]:
    """Read a table strictly; the second value is its key.

    Raises:
        CheckpointError: anything is not as specified, or it is of another schema.
    """
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"its schema is {str(version)[:20]}, not {SCHEMA_VERSION}")
    head = [document.get(name) for name in ("device", "build", "key")]
    rows = document.get("rows")
    if not all(isinstance(each, str) for each in head) or not isinstance(rows, list):
        raise CheckpointError("it is no dispatch table")
    found: dict[Product, list[Measured]] = {}
    for row in rows:
        product, measured = _parse_row(row)
        found.setdefault(product, []).append(measured)
    ordered = {
        product: tuple(sorted(each, key=lambda row: row.M)) for product, each in found.items()
    }
    return Table(Device(str(head[0]), str(head[1])), ordered), str(head[2])


def _parse_row(row: Any) -> tuple[Product, Measured]:
    names = ("format", "group", "dtype", "N", "K", "M", "choice", "kernel", "us")
    if not isinstance(row, dict) or set(row) != set(names):
        raise CheckpointError(f"a row has not exactly {', '.join(names)}")
    counts = [row[name] for name in ("N", "K", "M")]
    texts = [row[name] for name in ("format", "choice", "kernel")]
    us = row["us"]
    legal = (
        all(type(count) is int and count > 0 for count in counts)
        and all(isinstance(text, str) for text in texts)
        and (row["group"] is None or (type(row["group"]) is int and row["group"] > 0))
        and (row["dtype"] is None or isinstance(row["dtype"], str))
        and isinstance(us, dict)
        and all(type(t) in (int, float) and 0 < t < math.inf for t in us.values())
        and row["kernel"] in us
    )
    if not legal:
        raise CheckpointError(f"a row is not as specified: {str(row)[:80]}")
    product = Product(row["format"], row["group"], row["dtype"], row["N"], row["K"])
    return product, Measured(row["M"], row["choice"], row["kernel"], dict(us))
