"""Writing the output directory: a shard per block, then index and config, the manifest last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files import sha256_file, write_bytes, write_json, write_text
from ..kernels.formats import Dense
from ..kernels.schema import (
    FORMAT_VERSION,
    JOURNAL_FILE,
    MANIFEST_FILE,
    LinearFormat,
    QuantizationConfig,
)
from ..kernels.shards import INDEX_FILE, read_shard
from .card import model_card
from .journal import LinearRecord, ShardRecord
from .recover.state import STATE_FILE
from .source import SIDE_FILES, Source
from .tensors import save_tensors


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that a run writes, finished or left over from a kill."""
    ends = (INDEX_FILE, MANIFEST_FILE, "config.json", "README.md", *SIDE_FILES)
    written = (*ends, JOURNAL_FILE, STATE_FILE)
    shard = name.startswith("model-") and name.endswith(".safetensors")
    return shard or name in written or is_leftover(name)


def is_leftover(name: str) -> bool:
    """Whether this is a temporary file whose writer was killed."""
    return name.startswith(".") and name.endswith(".tmp")


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shard(
    directory: Path, name: str, tensors: Mapping[str, Tensor], linears: Mapping[str, LinearRecord]
) -> ShardRecord:
    """Put one shard on the disk, whole or not at all.

    Raises:
        CapacityError: the disk is full.
    """
    path = directory / name
    save_tensors(path, tensors, {"format": "pt"})
    return ShardRecord(name, sha256_file(path), path.stat().st_size, dict(linears))


def finish(
    source: Source,
    directory: Path,
    shards: Sequence[ShardRecord],
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    """Write everything but the shards; the manifest comes last and makes the directory complete."""
    linears = {name: record for shard in shards for name, record in shard.linears.items()}
    write_json(directory / INDEX_FILE, _index(directory, shards))
    copied = [name for name in SIDE_FILES if (source.path / name).is_file()]
    for name in copied:
        write_bytes(directory / name, (source.path / name).read_bytes())
    write_json(directory / "config.json", _config(source, linears))
    write_text(directory / "README.md", model_card(source, linears, shards, recipe, provenance))
    files = {shard.file: {"sha256": shard.sha256, "bytes": shard.bytes} for shard in shards}
    for name in (INDEX_FILE, "config.json", *copied):
        path = directory / name
        files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    manifest = {
        "format_version": FORMAT_VERSION,
        "recipe": dict(recipe),
        "provenance": dict(provenance),
        "linears": {name: asdict(record) for name, record in linears.items()},
        "files": files,
    }
    write_json(directory / MANIFEST_FILE, manifest)


def _index(directory: Path, shards: Sequence[ShardRecord]) -> dict[str, Any]:
    placed: dict[str, str] = {}
    total = 0
    for shard in shards:
        for name, tensor in read_shard(directory / shard.file, shard.sha256).items():
            if name in placed:
                raise CheckpointError(f"tensor {name} is in two shards of {directory}")
            placed[name] = shard.file
            total += tensor.nbytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def _config(source: Source, linears: Mapping[str, LinearRecord]) -> dict[str, Any]:
    """The source's config; with a quantization_config only if some linear is really packed."""
    packed = {
        name: LinearFormat(record.format, record.shape, record.group)
        for name, record in linears.items()
        if record.format != Dense.kind
    }
    if not packed:
        return source.config
    return {**source.config, "quantization_config": QuantizationConfig(packed).to_json()}
