"""The state of an unfinished training run: one file, replaced as a whole, so a kill loses little.

It holds numbers and named tensors, no code, and says which run it belongs to. Knows files; not what
the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ...errors import CheckpointError, RefusedError
from ...kernels.shards import read_shard
from ..tensors import save_tensors
from .settings import CurvePoint

STATE_FILE = ".halfweave-distill.safetensors"
MOMENTS_FILE = ".halfweave-moments.safetensors"  # of a training that another one goes on from


@dataclass(frozen=True)
class Position:
    """Where a run is: the resolved number of steps, how many are done, and what was measured."""

    total_steps: int
    done: int
    before: float
    minutes: float
    curve: tuple[CurvePoint, ...]


def save_state(
    directory: Path, key: Mapping[str, Any], position: Position, tensors: Mapping[str, Tensor]
) -> None:
    """Put the state in place of the one before.

    Raises:
        CapacityError: the disk is full; the state before is still there.
    """
    document = json.dumps({"key": dict(key), "position": asdict(position)})
    save_tensors(directory / STATE_FILE, tensors, {"state": document})


def load_state(
    directory: Path, key: Mapping[str, Any]
) -> tuple[Position, dict[str, Tensor]] | None:
    """The saved state, or None where there is none.

    Raises:
        RefusedError: it belongs to a run with other settings or inputs; the first is named.
        CheckpointError: the file is damaged.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return None
    tensors = read_shard(path)
    with _damage_named(path):
        document = _document(path)
        began, saved = document["key"], document["position"]
        curve = tuple(CurvePoint(**point) for point in saved.pop("curve"))
        position = Position(**saved, curve=curve)
    wanted = json.loads(json.dumps(key))
    for name in sorted(began.keys() | wanted.keys()):
        if began.get(name) != wanted.get(name):
            raise RefusedError(
                f"cannot resume the recovery in {directory}: {name} changed since it began",
                "run with the same settings and inputs, or start over without resuming",
            )
    return position, tensors


def save_moments(directory: Path, moments: Mapping[str, Tensor], steps: int) -> None:
    """Keep Adam's moments after so many steps, for a training that goes on.

    Raises:
        CapacityError: the disk is full.
    """
    save_tensors(directory / MOMENTS_FILE, moments, {"steps": str(steps)})


def hand_on_moments(directory: Path, other: Path) -> None:
    """Let `other` have the moments that `directory` keeps, if it does.

    Raises:
        CapacityError: the disk is full.
    """
    kept = load_moments(directory)
    if kept is not None:
        save_moments(other, *kept)


def load_moments(directory: Path) -> tuple[dict[str, Tensor], int] | None:
    """What `save_moments` kept there, and the steps; None where it did not.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / MOMENTS_FILE
    if not path.exists():
        return None
    tensors = read_shard(path)
    with _damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        return tensors, int(file.metadata()["steps"])


def began_with(directory: Path) -> Mapping[str, Any]:
    """The settings of the saved run; nothing where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return {}
    with _damage_named(path):
        settings: Mapping[str, Any] = _document(path)["key"]["settings"]
        return settings


def _document(path: Path) -> Any:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged", "start over without resuming") from error
