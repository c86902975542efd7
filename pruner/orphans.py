"""2:4 checkpoints that other tools wrote and stopped reading, as models of ours.

What is read: compressed-tensors' `sparse-24-bitmask`, `marlin-24` and `pack-quantized`, AutoGPTQ's
`marlin_24`, and dense directories whose linears happen to be 2:4. Nothing is rounded again: kept
values, codes and scales come over as they are. Names of formats come from a closed table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import CheckpointError, RefusedError, UnsupportedModel
from ..files import find_directory, read_json, sha256_file, write_json, write_text
from ..kernels import nibbles
from ..kernels.formats import (
    GROUP_SIZES,
    Dense,
    Int4,
    PackedLinear,
    Sparse24,
    Sparse24Int4,
)
from ..kernels.groups import group_count
from ..kernels.schema import FORMAT_VERSION, MANIFEST_FILE, LinearFormat, QuantizationConfig
from ..kernels.shards import ShardedTensors
from ..runtime.families import decoder_spec
from ..runtime.families.names import (
    asks_for_own_code,
    dense_is_transposed,
    with_base_prefix,
)
from . import marlin24
from .beside import built_beside, complete, refuse_taken
from .journal import LinearRecord
from .recipe import IMPORTED
from .tensors import save_tensors

_GROUP = 128  # of a row that has one scale, which is repeated
# Beside codes: zero points, and the columns' order. What they must be for codes to be ours.
_ASIDE = ("weight_zero_point", "weight_g_idx")
_BLOCKS = ("quantization_config", "compression_config", "sparsity_config")
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class OrphanResult:
    """What was read: linears by the format that they have now."""

    path: Path
    layout: str
    linears: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class OrphanPlan:
    """How a directory is stored, and the bytes of its weights; ours are as many, or fewer."""

    layout: str
    nbytes: int


def plan_orphan(model: str | Path, out: str | Path) -> OrphanPlan:
    """Refuse what `import_orphan` would before it reads a weight."""
    directory = find_directory(model)
    refuse_taken(Path(out))
    layout = layout_of(directory, read_json(directory / "config.json"))
    files = ShardedTensors.open(directory).files
    return OrphanPlan(layout, sum(file.stat().st_size for file in files))


def import_orphan(
    model: str | Path, out: str | Path, progress: Callable[[int, int, str], None] | None = None
) -> OrphanResult:
    """Write a directory of another tool as one of ours; `out` appears complete or not at all.

    Raises:
        UsageError: there is no such directory.
        RefusedError: `out` is taken, or no linear of the model is 2:4 or has codes.
        UnsupportedModel: a format or an architecture that is not known here.
        CheckpointError: the files are not what their config says.
    """
    directory, destination = find_directory(model), Path(out)
    refuse_taken(destination)
    config = read_json(directory / "config.json")
    layout = layout_of(directory, config)
    tensors = with_base_prefix(config, ShardedTensors.open(directory))
    with built_beside(destination) as build:
        writer = _Writer(directory, config, layout, tensors, build)
        files = writer.plan()
        for number, (file, names) in enumerate(files.items(), start=1):
            writer.write(file, names)
            if progress is not None:
                progress(number, len(files), file)
        return OrphanResult(destination, layout, writer.finish(destination.name), writer.nbytes)


def layout_of(directory: Path, config: Mapping[str, Any]) -> str:
    """Which of the layouts a directory says to have.

    Raises:
        UnsupportedModel: none that is known here.
    """
    if asks_for_own_code(config):
        raise RefusedError("config.json has an auto_map: code from a checkpoint is never run")
    blocks = [config[key] for key in _BLOCKS[:2] if isinstance(config.get(key), dict)]
    block: dict[str, Any] = blocks[0] if blocks else {}
    sparsity = block.get("sparsity_config") or config.get("sparsity_config") or {}
    said = [block.get("format"), sparsity.get("format"), block.get("checkpoint_format")]
    quantize = directory / "quantize_config.json"
    if quantize.is_file():
        said.append(read_json(quantize).get("checkpoint_format"))
    if block.get("transform_config"):
        raise UnsupportedModel(
            "quantization_config: its weights are turned by a transform, which is not undone here"
        )
    known = [name for name in said if name in _READERS]
    if known:
        _check_scales(block)
        return str(known[0])
    if block and block.get("quant_method") != "compressed-tensors":
        method = str(block.get("quant_method"))[:40]
        raise UnsupportedModel(
            f"quantization_config: method {method!r} is not read here; known formats are "
            f"{', '.join(_READERS)}"
        )
    if any(name not in (None, "dense") for name in said):
        raise UnsupportedModel(
            f"format {str(said)[:60]} is none of {', '.join(_READERS)}",
            "decompress it with the tool that wrote it, and prune or import the dense model",
        )
    return "dense"


def _check_scales(block: Mapping[str, Any]) -> None:
    """Refuse codes that are not symmetric, or in groups that no format of ours has."""
    groups = block.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        if weights.get("symmetric") is False:
            raise UnsupportedModel("its codes have zero points; only symmetric ones are read here")
        size = weights.get("group_size")
        if size not in (None, -1, *GROUP_SIZES):
            raise UnsupportedModel(f"groups of {size} columns are none of {GROUP_SIZES}")


def _bitmask(parts: Parts, name: str) -> PackedLinear:
    rows, columns = (int(side) for side in parts["shape"].flatten())
    values, mask = parts["compressed"], parts["bitmask"]
    if (
        columns % 4
        or mask.shape != (rows, -(-columns // 8))
        or values.shape != (rows, columns // 2)
    ):
        raise CheckpointError(f"{name}: shape, compressed and bitmask do not fit each other")
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    kept = bits.flatten(1)[:, :columns].bool().view(rows, columns // 4, 4)
    if not bool((kept.sum(-1) == 2).all()):
        raise CheckpointError(f"{name}: bitmask does not keep two of every four columns")
    indices = kept.nonzero()[:, 2].view(rows, columns // 4, 2).to(torch.uint8)
    return Sparse24(values.contiguous(), nibbles.pack_meta(indices))


def _marlin(packed: Tensor, meta: Tensor, scale: Tensor, name: str) -> PackedLinear:
    rows, columns = packed.shape[1] // 2, 32 * packed.shape[0]
    legal = packed.shape == meta.shape == (columns // 32, 2 * rows) and scale.shape[1:] == (rows,)
    if not legal or rows % 64 or columns % len(scale):
        raise CheckpointError(f"{name}: codes, metadata and scales do not fit each other")
    codes = marlin24.kept_codes(packed, rows, columns)
    indices = marlin24.kept_positions(meta, rows, columns)
    if not bool((indices[..., 0] < indices[..., 1]).all()):
        raise CheckpointError(f"{name}: metadata is not that of 2:4")
    scales = marlin24.scales(scale, columns)
    group = columns // scales.shape[1]
    if group != _GROUP and scales.shape[1] > 1:
        raise CheckpointError(f"{name}: scales of {group} columns, the layout has 128 or a row")
    if scales.shape[1] == 1:
        scales = scales.expand(rows, group_count(columns, _GROUP))
    values = nibbles.pack_nibbles((codes + 8).to(torch.uint8))
    scales = scales.to(torch.float16).contiguous()
    return Sparse24Int4(values, nibbles.pack_meta(indices), scales, _GROUP)


def _pack_quantized(parts: Parts, name: str) -> PackedLinear:
    rows, columns = (int(side) for side in parts["weight_shape"].flatten())
    words, scale = parts["weight_packed"], parts["weight_scale"]
    if words.shape != (rows, -(-columns // 8)) or len(scale) != rows or scale.dim() != 2:
        raise CheckpointError(f"{name}: these are not 4-bit codes with a scale for every group")
    codes = (words.to(torch.int64)[..., None] >> 4 * torch.arange(8)) & 15
    codes = codes.flatten(1)[:, :columns] - 8
    fitting = [size for size in GROUP_SIZES if group_count(columns, size) == scale.shape[1]]
    if scale.shape[1] > 1 and not fitting:
        raise CheckpointError(f"{name}: {scale.shape[1]} scales do not go with {columns} columns")
    group = _GROUP if scale.shape[1] == 1 else fitting[0]
    zeros, order = (parts.get(suffix) for suffix in _ASIDE)
    # Some writers put zero points of 0 beside symmetric codes; packed ones are never 0.
    if zeros is not None and (zeros.dtype != torch.int8 or bool(zeros.any())):
        raise UnsupportedModel(f"{name}: its codes have zero points; only symmetric ones are read")
    if order is not None and not bool((order == torch.arange(columns) // group).all()):
        raise UnsupportedModel(f"{name}: its columns have an order of their own, not read here")
    scales = scale.expand(rows, group_count(columns, group)).to(torch.float16).contiguous()
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{name}: a scale does not fit fp16")
    if columns % 4 == 0 and bool(((codes != 0).view(rows, -1, 4).sum(-1) <= 2).all()):
        return Sparse24Int4.from_codes(codes, codes != 0, scales, group, name)
    return Int4.from_codes(codes, scales, group)


def _gptq(parts: Parts, name: str) -> PackedLinear:
    return _marlin(parts["B_24"], parts["B_meta"], parts["s"], name)


def _compressed(parts: Parts, name: str) -> PackedLinear:
    return _marlin(parts["weight_packed"], parts["meta"], parts["scale_packed"], name)


# Suffixes of a linear's tensors, and what makes a weight of them.
_READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Parts, str], PackedLinear]]] = {
    "sparse-24-bitmask": (("compressed", "bitmask", "shape"), _bitmask),
    "marlin-24": (("weight_packed", "meta", "scale_packed"), _compressed),
    "marlin_24": (("B_24", "B_meta", "s"), _gptq),
    "pack-quantized": (("weight_packed", "weight_scale", "weight_shape"), _pack_quantized),
}


@dataclass
class _Writer:
    """Shards of the output, and what they hold so far."""

    directory: Path
    config: Mapping[str, Any]
    layout: str
    tensors: ShardedTensors
    build: Path
    records: dict[str, LinearRecord] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def plan(self) -> dict[str, list[str]]:
        """Names of linears, and of tensors that are no part of one, by the file that they go to."""
        files: dict[str, list[str]] = defaultdict(list)
        seen = set()
        linears = set(decoder_spec(self.config).linear_names)
        suffixes = _READERS[self.layout][0] if self.layout in _READERS else ("weight",)
        aside = _ASIDE if self.layout == "pack-quantized" else ()
        for tensor in self.tensors.names():
            name, _, suffix = tensor.rpartition(".")
            inside = suffix in (*suffixes, *aside)
            if inside and suffix != "weight" and name not in linears:
                raise UnsupportedModel(f"{tensor}: {name} is packed, and is no linear of a block")
            whole = name if inside and name in linears else tensor
            if whole not in seen:
                seen.add(whole)
                files[self.tensors.file_of(tensor).name].append(whole)
        return dict(files)

    def write(self, file: str, names: list[str]) -> None:
        """One shard."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self.tensors:
                found[name] = self.tensors.read(name)
                continue
            weight = self._linear(name)
            weight.validate(name)
            group = getattr(weight, "group", None)
            record = LinearRecord(weight.kind, weight.shape, group, "imported", None)
            self.records[name] = record
            if isinstance(weight, Dense):
                found[f"{name}.weight"] = self.tensors.read(f"{name}.weight")
            else:
                found |= {f"{name}.{suffix}": part for suffix, part in weight.tensors().items()}
        save_tensors(self.build / file, found, {"format": "pt"})
        self.weight_map |= dict.fromkeys(found, file)
        self.nbytes += sum(tensor.nbytes for tensor in found.values())

    def finish(self, title: str) -> dict[str, int]:
        """Everything beside the shards; returns linears by format."""
        formats = {
            name: LinearFormat(record.format, record.shape, record.group)
            for name, record in self.records.items()
            if record.format != Dense.kind
        }
        if not formats:
            raise RefusedError(f"{self.directory} has no linear that is 2:4 or has codes")
        complete(self.build, self.directory, self.weight_map, self.nbytes)
        config = {key: value for key, value in self.config.items() if key not in _BLOCKS}
        block = QuantizationConfig(formats).to_json()
        write_json(self.build / "config.json", {**config, "quantization_config": block})
        write_text(
            self.build / "README.md",
            f"---\nbase_model: {self.directory.name}\n---\n\n# {title}\n\nImported by halfweave "
            f"{__version__} from `{self.directory.name}`, which another tool wrote as "
            f"{self.layout}; its licence carries over. Nothing was rounded or measured.\n",
        )
        self._vouch()
        counts: dict[str, int] = defaultdict(int)
        for record in self.records.values():
            counts[record.format] += 1
        return dict(counts)

    def _linear(self, name: str) -> PackedLinear:
        if self.layout in _READERS:
            suffixes, read = _READERS[self.layout]
            found = [*suffixes, *(s for s in _ASIDE if f"{name}.{s}" in self.tensors)]
            return read({s: self.tensors.read(f"{name}.{s}") for s in found}, name)
        weight = self.tensors.read(f"{name}.weight")
        if dense_is_transposed(self.config):
            weight = weight.T.contiguous()
        fours = weight.view(len(weight), -1, 4) if weight.shape[1] % 4 == 0 else None
        if fours is not None and bool(((fours != 0).sum(-1) <= 2).all()):
            return Sparse24.from_dense(weight, name)
        return Dense(weight)

    def _vouch(self) -> None:
        """The manifest, last."""
        files = {
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(self.build.iterdir())
            if path.name != "README.md"
        }
        base = {"name": self.directory.name, "layout": self.layout}
        manifest = {
            "format_version": FORMAT_VERSION,
            "recipe": IMPORTED,
            "provenance": {"halfweave": __version__, "base": base},
            "linears": {name: asdict(record) for name, record in self.records.items()},
            "files": files,
        }
        write_json(self.build / MANIFEST_FILE, manifest)
