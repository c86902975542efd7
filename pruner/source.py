"""The dense model that is being pruned: a directory, opened, checked, and never written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RefusedError
from ..files import find_directory, read_json, sha256_file
from ..kernels.device import parse_device
from ..kernels.formats import FLOAT_DTYPES
from ..kernels.shards import ShardedTensors
from ..runtime.checkpoint import Checkpoint, check_tied
from ..runtime.families.names import asks_for_own_code, is_ignored, with_base_prefix
from .families import family_of
from .family import Family
from .tasks import Here, Tasks

# What a model directory carries beside its weights, copied as it is.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "halfweave-import.json",  # where the weights came from, if they were imported
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)


@dataclass(frozen=True)
class Source:
    """A dense Hugging Face directory of a known family. Make it with `open`.

    `device` is where its blocks are worked on: `block_tensors` are there, all else is on the CPU.
    `tasks` do the work that may be done elsewhere.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: ShardedTensors
    device: torch.device = field(kw_only=True, default=torch.device("cpu"))
    tasks: Tasks = field(kw_only=True, default=Here())

    @classmethod
    def open(cls, path: str | Path, device: str = "cpu") -> Source:
        """Open and check everything that can be checked without reading weights.

        A head that should be the embedding is read, where the files have one.

        Raises:
            UsageError: the path is missing or a file, or there is no such device.
            RefusedError: unsafe weights, or a model that is quantized already.
            UnsupportedModel: unknown architecture.
            CheckpointError: config or shards are damaged or disagree.
        """
        where, directory = parse_device(device), find_directory(path)
        config = read_json(directory / "config.json")
        if not asks_for_own_code(config):
            config.pop("auto_map", None)  # it would name files that nobody copies
        if "quantization_config" in config:
            raise RefusedError(
                f"{directory} is quantized or pruned already", "start from the dense model"
            )
        family = family_of(config)
        tensors = with_base_prefix(config, ShardedTensors.open(directory))
        if family.tied:
            check_tied(tensors, family.embedding, family.head)
        source = cls(directory, config, family, tensors, device=where)
        for index in range(source.block_count):
            for name in source.linear_names(index):
                source.linear_shape(name)
        return source

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return self.family.layers

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and of every weight file, by file name."""
        files = [self.path / "config.json", *self.tensors.files]
        return {file.name: sha256_file(file) for file in files}

    def linear_names(self, index: int) -> list[str]:
        """Full names of a block's prunable linears, in order."""
        prefix = self.family.block_prefix(index)
        return [prefix + name for name in self.family.linears]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a linear.

        Raises:
            CheckpointError: the weight is missing or no float matrix.
        """
        info = self.tensors.info(f"{name}.weight")
        if len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {name}.weight: expected a float matrix, "
                f"found {info.dtype} {list(info.shape)}"
            )
        rows, columns = reversed(info.shape) if self.family.transposed else info.shape
        return rows, columns

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """All tensors of a block, by full name, in their stored dtype, on `device`.

        Weights of linears are [N, K], however they are stored.
        """
        tensors = {name: self.tensors.read(name) for name in self.names_of_block(index)}
        return {name: t.to(self.device) for name, t in self.turned(tensors).items()}

    def names_of_block(self, index: int) -> list[str]:
        """Full names of a block's tensors."""
        prefix = self.family.block_prefix(index)
        return [name for name in self._weights if name.startswith(prefix)]

    def other_tensors(self) -> dict[str, Tensor]:
        """Everything that belongs to no block: embeddings, final norm, head."""
        inside = self.family.blocks + "."
        names = [name for name in self._weights if not name.startswith(inside)]
        return {name: self.outside(name) for name in names}

    def outside(self, name: str) -> Tensor:
        """A tensor that belongs to no block."""
        return self.tensors.read(name)

    @cached_property
    def _weights(self) -> list[str]:
        """Names of the tensors that are weights."""
        return [name for name in self.tensors.names() if not is_ignored(name)]

    def turned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors from [N, K] to how the family stores linears of floats, or back."""
        if not self.family.transposed:
            return dict(tensors)
        ends = tuple(f".{short}.weight" for short in self.family.linears)
        return {
            name: tensor.T.contiguous() if name.endswith(ends) else tensor
            for name, tensor in tensors.items()
        }


@dataclass(frozen=True)
class Trained(Source):
    """A dense model whose blocks' weights are those of a checkpoint that was made from it.

    All that describes it (path, config, shapes, hashes) is the dense model's own.
    """

    checkpoint: Checkpoint

    @classmethod
    def of(cls, parent: Source, checkpoint: Checkpoint) -> Trained:
        """`parent` with the weights of `checkpoint`."""
        return cls(
            parent.path,
            parent.config,
            parent.family,
            parent.tensors,
            checkpoint,
            device=parent.device,
            tasks=parent.tasks,
        )

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """All tensors of a block; packed linears as fp32 weights, what they are served as."""
        floats, packed = {}, {}
        for name in self.names_of_block(index):
            if name in self.checkpoint:
                floats[name] = self.checkpoint.tensor(name)
            else:
                linear = self.checkpoint.linear(name.removesuffix(".weight"))
                packed[name] = linear.to(self.device).unpack()
        return {**{n: t.to(self.device) for n, t in self.turned(floats).items()}, **packed}

    def stored_block(self, index: int) -> dict[str, Tensor]:
        """All tensors of a block as the checkpoint holds them."""
        found = {}
        for name in self.names_of_block(index):
            linear = name.removesuffix(".weight")
            if name in self.checkpoint:
                found[name] = self.checkpoint.tensor(name)
            else:
                parts = self.checkpoint.linear(linear).tensors()
                found |= {f"{linear}.{suffix}": part for suffix, part in parts.items()}
        return found

    def outside(self, name: str) -> Tensor:
        """A tensor that belongs to no block, as trained."""
        return self.checkpoint.tensor(name)


def first_nonfinite(tensor: Tensor) -> list[int] | None:
    """Index of the first NaN or infinity, or None."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    where: list[int] = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
    return where


def token_ids(source: Source, text: str) -> list[int]:
    """The text by the model's own tokenizer, without special tokens.

    Raises:
        CheckpointError: the model has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:  # a damaged one raises Exception itself
        raise CheckpointError(f"{source.path}: no usable tokenizer: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
