"""What an unfinished choice has on the disk: candidates, sensitivities, measurements.

Every file is put in place as a whole, so a killed run goes on with what is there. The key says
which run it all belongs to; the budget itself is not part of it, so that another budget for the
same model starts from the same candidates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ... import __version__
from ...errors import CheckpointError, RefusedError
from ...files import read_json, write_json
from ...kernels.formats import FORMATS, PackedLinear, from_tensors, needs_group
from ...kernels.shards import read_shard
from ..recipe import Recipe
from ..save import is_leftover
from ..source import Source
from ..tensors import save_tensors
from .knapsack import Option
from .windows import BudgetWindows

_KEY, _MEASURED, _SENSITIVITY = "budget.json", "measured.json", "sensitivity.safetensors"

Packed = Mapping[str, Mapping[str, PackedLinear]]  # by linear, then by format
Options = Mapping[str, Sequence[Option]]  # by linear


class Scratch:
    """A directory of its own for one choice. Make it with `open`."""

    def __init__(self, directory: Path, group: int) -> None:
        self._directory, self._group = directory, group
        measured = directory / _MEASURED
        self._measured: dict[str, list[float]] = read_json(measured) if measured.exists() else {}

    @classmethod
    def open(cls, directory: Path, key: Mapping[str, Any], group: int) -> Scratch:
        """Begin in an empty or missing directory, or go on in one of the same run.

        Raises:
            RefusedError: the directory belongs to another run; what differs is named.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path, wanted = directory / _KEY, json.loads(json.dumps(key))
        if not path.exists():
            if not all(is_leftover(entry.name) for entry in directory.iterdir()):
                raise RefusedError(f"{directory} holds other files", "choose an empty directory")
            write_json(path, wanted)
        began = read_json(path)
        for name in sorted(began.keys() | wanted.keys()):
            if began.get(name) != wanted.get(name):
                raise RefusedError(
                    f"cannot go on in {directory}: {name} changed since it began",
                    "run with the same settings and inputs, or remove the directory",
                )
        for entry in directory.iterdir():
            if is_leftover(entry.name):
                entry.unlink()
        return cls(directory, group)

    def sensitivity(self) -> dict[str, Tensor] | None:
        """As it was saved, or None."""
        path = self._directory / _SENSITIVITY
        return read_shard(path) if path.exists() else None

    def save_sensitivity(self, found: Mapping[str, Tensor]) -> None:
        """Raises CapacityError when the disk is full, as all that save here do."""
        save_tensors(self._directory / _SENSITIVITY, found, {})

    def options(self, index: int) -> dict[str, list[Option]] | None:
        """The options of a block's linears, or None if its candidates are not there yet."""
        path = self._shard(index)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                table = json.loads(file.metadata()["options"])
            return {name: [Option(**each) for each in those] for name, those in table.items()}
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged", "remove it and run again") from error

    def save_block(self, index: int, options: Options, packed: Packed) -> None:
        """Keep a block's options and their weights."""
        tensors = {
            f"{name}.{kind}.{suffix}": tensor
            for name, kinds in packed.items()
            for kind, linear in kinds.items()
            for suffix, tensor in linear.tensors().items()
        }
        table = {name: [asdict(each) for each in those] for name, those in options.items()}
        save_tensors(self._shard(index), tensors, {"options": json.dumps(table)})

    def packed(
        self, index: int, kinds: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]
    ) -> dict[str, PackedLinear]:
        """The saved candidates that `kinds` names, of a block's linears."""
        stored, found = read_shard(self._shard(index)), {}
        for name, kind in kinds.items():
            prefix = f"{name}.{kind}."
            parts = {s: stored[prefix + s] for s in FORMATS[kind].suffixes if prefix + s in stored}
            group = self._group if needs_group(kind) else None
            found[name] = from_tensors(kind, parts, shapes[name], group, name)
        return found

    def measured(self, choices: Mapping[str, str], windows: Tensor) -> list[float] | None:
        """Losses on each of `windows` of the model with these formats, if they were measured."""
        return self._measured.get(_digest(choices, windows))

    def save_measured(
        self, choices: Mapping[str, str], windows: Tensor, losses: list[float]
    ) -> None:
        """Keep a measurement."""
        self._measured[_digest(choices, windows)] = losses
        write_json(self._directory / _MEASURED, self._measured)

    def _shard(self, index: int) -> Path:
        return self._directory / f"block-{index:05d}.safetensors"


def run_key(source: Source, recipe: Recipe, windows: BudgetWindows) -> dict[str, Any]:
    """All that candidates and measurements depend on."""
    fields = ("method", "group", "damping", "seed", "allow_nonfinite")
    asked = recipe.to_json()
    parts = (windows.fit, windows.check, windows.search, windows.judge)
    return {
        "halfweave": __version__,
        "torch": torch.__version__,
        "device": str(source.device),
        "threads": torch.get_num_threads(),
        "base": source.hashes,
        "recipe": {field: asked[field] for field in fields},
        "windows": [_hash(part) for part in parts],
    }


def _hash(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _digest(choices: Mapping[str, str], windows: Tensor) -> str:
    measured = [sorted(choices.items()), _hash(windows)]
    return hashlib.sha256(json.dumps(measured).encode()).hexdigest()
