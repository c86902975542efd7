"""A directory of safetensors files as one map from tensor name to tensor.

Never follows a path out of the directory, never opens a pickle, and returns memory of its own, so
that a file truncated later cannot crash the process. Knows files and tensors, not models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import CapacityError, CheckpointError, RefusedError
from ..files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what the file's header says of it. `start` counts from the file's."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    nbytes: int


@dataclass(frozen=True)
class ShardedTensors:
    """The tensors of one model directory. Make it with `open`."""

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> ShardedTensors:
        """Read the index and every header, and check that they agree.

        Raises:
            RefusedError: there are only pickle or GGUF weights, or a path leads out.
            CheckpointError: a shard is missing, truncated or lying, or a tensor is missing or
                stored twice.
        """
        index = directory / INDEX_FILE
        placed = _read_index(index) if index.exists() else None
        names = [SINGLE_FILE] if placed is None else sorted(set(placed.values()))
        if placed is None and not (directory / SINGLE_FILE).exists():
            raise _no_weights(directory)
        files = tuple(_inside(directory, name) for name in names)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(file).items():
                if name in tensors:
                    other = tensors[name].file.name
                    raise CheckpointError(f"tensor {name} is in both {other} and {file.name}")
                tensors[name] = info
        if placed is not None:
            _check_index(index, placed, tensors)
        _refuse_others(directory, files)
        return cls(directory, files, tensors)

    def renamed(self, rename: Callable[[str], str]) -> ShardedTensors:
        """The same tensors under other names.

        Raises:
            CheckpointError: two of them would have one name.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            new = rename(name)
            if new in tensors:
                raise CheckpointError(f"{self.directory}: {name} and another tensor are both {new}")
            tensors[new] = info
        return replace(self, tensors=tensors)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} is missing in {self.directory}")
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""
        return self.info(name).dtype

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.info(name).file

    def read(self, name: str) -> Tensor:
        """One tensor, read (not mapped) into memory of its own.

        Raises:
            CheckpointError: there is no such tensor, or the file has been cut off meanwhile.
        """
        info = self.info(name)
        data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")  # not zeroed, as bytes are
        with _typed_errors(info.file), open(info.file, "rb") as file:
            file.seek(info.start)
            if file.readinto(data.numpy().data) != info.nbytes:
                raise ValueError("it ends before its last tensor does")
        return data.view(info.dtype).view(info.shape)

    def read_file(self, file: Path, sha256: str | None = None) -> dict[str, Tensor]:
        """All tensors of one of `files`, by the names they have there: see `read_shard`."""
        return read_shard(file, sha256)


def read_shard(file: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of one file, read once and, where a hash is given, verified first.

    Raises:
        CheckpointError: the file is missing or not valid, or the hash differs.
    """
    with _typed_errors(file):
        data = file.read_bytes()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{file} is damaged: its SHA-256 is not the one on record",
            "copy the file again, or prune again",
        )
    with _typed_errors(file):
        loaded: dict[str, Tensor] = safetensors.torch.load(data)
    return loaded


class _typed_errors:  # noqa: N801 - reads as a statement: `with _typed_errors(file):`
    """Turns the library's errors into CheckpointError that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{self._file} is missing") from error
        if isinstance(error, RuntimeError) and "mmap" in str(error):
            raise CapacityError(
                f"{self._file} is larger than this system maps: {error}",
                "store the model in shards of a few GB",
            ) from error
        if isinstance(error, (safetensors.SafetensorError, OSError, ValueError)):
            raise CheckpointError(
                f"{self._file} is no valid safetensors file: {error}",
                "the file is cut off or damaged: copy it again",
            ) from error


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """All entries of a file's header, after the library has proved them.

    Opening checks the header's length and JSON, and that offsets follow each other without holes
    or overlaps, agree with shapes and dtypes, and end where the file does.
    """
    with _typed_errors(file):
        with safetensors.safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    found: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has dtype {dtype}, which is not read")
        shape = tuple(entry["shape"])
        found[name] = TensorInfo(file, shape, _DTYPES[dtype], 8 + length + begin, end - begin)
    return found


def _read_index(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index} has no weight_map")
    if not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    return placed


def _refuse_others(directory: Path, files: Sequence[Path]) -> None:
    """A shard that no index lists is left over from another model, or was slipped in."""
    listed = {file.name for file in files}
    for file in sorted((*directory.glob(SINGLE_FILE), *directory.glob("model-*.safetensors"))):
        if file.name not in listed:
            raise CheckpointError(f"{file} is no part of this model", "move it away")


def _check_index(index: Path, placed: Mapping[str, str], found: Mapping[str, TensorInfo]) -> None:
    for name, file in placed.items():
        if name not in found or found[name].file.name != file:
            raise CheckpointError(f"{index}: tensor {name} is not in {file}")
    for name in found.keys() - placed.keys():
        raise CheckpointError(f"{index}: tensor {name} of {found[name].file.name} is not listed")


def _inside(directory: Path, name: str) -> Path:
    """`directory/name`, provided that it is a plain file of this directory.

    A symlink is followed only as far as the hub's own cache layout goes: to a blob two levels up.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise RefusedError(f"{directory / INDEX_FILE}: {name!r} is not a file of this directory")
    path = directory / name
    if not path.exists():
        raise CheckpointError(f"{path} is missing", "copy the missing shard")
    if path.is_symlink():
        target, blobs = path.resolve(), (directory / ".." / ".." / "blobs").resolve()
        if target.parent not in (directory.resolve(), blobs):
            raise RefusedError(f"{path} is a link that leads out of the directory")
    return path


def _no_weights(directory: Path) -> CheckpointError | RefusedError:
    unsafe = _named(directory, _UNSAFE_SUFFIXES)
    if unsafe:
        return RefusedError(
            f"{directory} holds only {unsafe[0]}: pickled weights are never opened",
            "convert it on a machine that you can lose: load the model there with transformers "
            "and call save_pretrained(..., safe_serialization=True)",
        )
    gguf = _named(directory, (".gguf",))
    if gguf:
        return RefusedError(
            f"{directory} holds a GGUF file, no safetensors",
            f"halfweave import {directory / gguf[0]} OUT",
        )
    return CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _named(directory: Path, suffixes: Iterable[str]) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.suffix in tuple(suffixes))
