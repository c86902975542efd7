"""Small recipes and small changes for tests of the pruner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from halfweave.pruner.recipe import Recipe

TEXT = Path(__file__).parents[2] / "LICENSE"  # any English will do
SMALL = {"calib": str(TEXT), "calib_windows": 4, "calib_length": 32}


def recipe(**changes: object) -> Recipe:
    return Recipe(**{**SMALL, **changes})  # type: ignore[arg-type]


def set_weight(directory: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors[name])
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def everything(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
