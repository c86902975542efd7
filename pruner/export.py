"""Pruned models for other people's tools: dense safetensors, or compressed-tensors int4.

Shard by shard, so that memory holds one of them. What comes out is a Hugging Face directory without
a word of ours in its config; zeros stay zeros, and cost what any weight costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import RefusedError, UsageError
from ..files import write_json, write_text
from ..kernels.formats import FORMATS
from ..runtime.checkpoint import Checkpoint
from ..runtime.families.names import dense_is_transposed
from . import pack_quantized
from .beside import built_beside, complete, refuse_taken
from .pack_quantized import Scheme
from .tensors import save_tensors

DENSE, COMPRESSED = "dense", "compressed-tensors"
FORMS = (DENSE, COMPRESSED)
_EXPERTS = ("num_experts", "num_local_experts")  # in a config: how many there are
_HEADS = ("lm_head", "embed_out")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportResult:
    """What was written. `packed` linears have codes, all others are dense."""

    path: Path
    form: str
    dtype: str
    packed: int
    dense: int
    nbytes: int


def export(
    model: str | Path,
    out: str | Path,
    form: str = DENSE,
    dtype: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> ExportResult:
    """Write a model of ours as a directory that others load; `out` appears complete or not at all.

    `dtype` is that of floats: auto (the config's), bfloat16, float16 or float32.

    Raises:
        UsageError: there is no such form or dtype, or no such directory.
        RefusedError: `out` is taken, or nothing in the model can be stored in this form.
        CheckpointError: the model is damaged.
        CapacityError: the disk is full.
    """
    if form not in FORMS:
        raise UsageError(f"form {form!r} is none of {', '.join(FORMS)}")
    destination = Path(out)
    refuse_taken(destination)
    checkpoint = Checkpoint.open(model)
    floats, transposed = _float_dtype(checkpoint, dtype), dense_is_transposed(checkpoint.config)
    if form == COMPRESSED and (transposed or any(map(checkpoint.config.get, _EXPERTS))):
        raise RefusedError(
            "transformers keeps this kind of model in other modules than compressed-tensors knows",
            f"--form {DENSE} writes floats",
        )
    with built_beside(destination) as build:
        writer = _Writer(checkpoint, transposed, build, form, _DTYPES[floats])
        files = writer.plan()
        for number, (name, entries) in enumerate(files.items(), start=1):
            writer.write(name, entries)
            if progress is not None:
                progress(number, len(files), name)
        writer.finish(floats)
        result = ExportResult(
            destination, form, floats, len(writer.schemes), len(writer.dense), writer.nbytes
        )
        write_text(build / "README.md", _card(result, checkpoint))
    return result


def _float_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if stored is None:  # as older configs
        floats = {checkpoint.tensors.dtype(name) for name in checkpoint.names()}
        known = [name for name, each in _DTYPES.items() if each in floats]
        stored = known[0] if known else "bfloat16"
    wanted = str(stored) if dtype == "auto" else dtype
    if wanted not in _DTYPES:
        raise UsageError(f"dtype {wanted!r} is none of {', '.join(_DTYPES)}")
    return wanted


@dataclass
class _Writer:
    """Shards of the output, and what they hold so far."""

    checkpoint: Checkpoint
    transposed: bool  # linears of floats are [K, N]
    build: Path
    form: str
    dtype: torch.dtype
    schemes: dict[str, Scheme] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    weight_map: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0

    def plan(self) -> dict[str, list[str]]:
        """Linears and plain tensors by the file that is to hold them: where they are now."""
        linears, files = self.checkpoint.linears, defaultdict(list)
        inside = {
            f"{name}.{suffix}": name
            for name, entry in linears.items()
            for suffix in FORMATS[entry.format].suffixes
        }
        seen = set()
        for tensor in self.checkpoint.names():
            name = inside.get(tensor, tensor)
            if name not in seen:
                seen.add(name)
                files[self.checkpoint.file_of(tensor).name].append(name)
        return dict(files)

    def write(self, file: str, names: list[str]) -> None:
        """One shard."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in self.checkpoint.linears:
                tensors |= {f"{name}.{suffix}": t for suffix, t in self._linear(name).items()}
            else:
                tensors[name] = self._plain(name)
        save_tensors(self.build / file, tensors, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, dtype: str) -> None:
        """Index, config and the files beside the weights."""
        if self.form == COMPRESSED and not self.schemes:
            raise RefusedError(
                "no linear of this model has codes in whole groups", f"--form {DENSE} writes floats"
            )
        complete(self.build, self.checkpoint.path, self.weight_map, self.nbytes)
        config: dict[str, Any] = dict(self.checkpoint.config)
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        if self.schemes:
            ignored = sorted({*self.dense, *_HEADS})
            config["quantization_config"] = pack_quantized.quantization_config(
                self.schemes, ignored
            )
        write_json(self.build / "config.json", config)

    def _linear(self, name: str) -> dict[str, Tensor]:
        weight = self.checkpoint.linear(name)
        scheme = Scheme.of(weight) if self.form == COMPRESSED else None
        if scheme is None:
            self.dense.append(name)
            floats = self._cast(name, weight.unpack(torch.float32))
            return {"weight": floats.T if self.transposed else floats}
        self.schemes[name] = scheme
        return pack_quantized.tensors_of(weight, self.dtype)

    def _plain(self, name: str) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and module != name and "embed" not in module:
            self.dense.append(module)
        return self._cast(name, tensor) if tensor.is_floating_point() else tensor

    def _cast(self, name: str, floats: Tensor) -> Tensor:
        made = floats.to(self.dtype)
        if bool(made.isinf().any()) and not bool(floats.isinf().any()):
            raise UsageError(
                f"{name} has numbers that {str(self.dtype).rpartition('.')[2]} cannot hold",
                "--dtype bfloat16, or float32",
            )
        return made


def _card(result: ExportResult, checkpoint: Checkpoint) -> str:
    stored = "All weights are dense; pruned ones are zeros"
    if result.packed:
        stored = (
            f"{result.packed} linears are codes as compressed-tensors has them "
            f"(`{pack_quantized.FORMAT}`), 0 where they are pruned"
        )
    return (
        f"---\nbase_model: {checkpoint.path.name}\n---\n\n# {result.path.name}\n\n"
        f"Exported by halfweave {__version__} from `{checkpoint.path.name}`, pruned by halfweave. "
        f"{stored}; floats are {result.dtype}. {result.nbytes:,} bytes of weights.\n\n"
        "Nothing of it was measured in this form.\n"
    )
