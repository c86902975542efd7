"""A model directory, dense or packed, opened and checked before a single weight is used.

A directory is data: no code of it runs, no path or import in it is followed, and no file outside it
is read. Knows files, hashes and declared shapes; not what the tensors mean to a decoder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, RefusedError
from ..files import find_directory, read_json
from ..kernels.formats import FORMATS, Dense, PackedLinear, expected_tensors, from_tensors
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE, LinearFormat, parse_quantization_config
from ..kernels.shards import ShardedTensors
from .families.names import asks_for_own_code, is_ignored, with_base_prefix
from .manifest import Manifest

_ROWS_COMPARED = 4096
_FOREIGN_KEYS = ("compression_config", "sparsity_config")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model directory. Make it with `open`.

    `linears` has the format of each linear that is not stored as a plain `.weight`; `manifest` is
    halfweave.json, or None in a directory that halfweave did not make. `tensors` have the names
    that transformers knows them by.
    """

    path: Path
    config: Mapping[str, Any]
    linears: Mapping[str, LinearFormat]
    manifest: Mapping[str, Any] | None
    tensors: ShardedTensors
    _stamps: Mapping[Path, tuple[int, int, int]]
    _used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Checkpoint:
        """Open a directory and check that its files agree with each other.

        `verify` compares every file with the SHA-256 in the manifest, where there is one.

        Raises:
            UsageError: no such directory.
            RefusedError: unsafe or foreign files, or a newer format.
            CheckpointError: incomplete, damaged, or contradictory files.
        """
        directory = find_directory(path)
        _refuse_links_out(directory)
        if (directory / JOURNAL_FILE).exists():
            raise _incomplete(directory)
        config = read_json(directory / "config.json")
        _refuse_foreign(directory, config)
        linears: Mapping[str, LinearFormat] = {}
        if config.get("quantization_config") is not None:
            linears = parse_quantization_config(config["quantization_config"]).linears
        manifest = _read_manifest(directory, packed=bool(linears))
        if manifest is not None:
            manifest.check_sizes(directory)  # says more of a file cut off than its reader can
        tensors = with_base_prefix(config, ShardedTensors.open(directory))
        stamps = {file: _stamp(file) for file in tensors.files}
        if manifest is not None:
            _check_files(directory, manifest, tensors, verify)
        document = None if manifest is None else manifest.document
        checkpoint = cls(directory, config, linears, document, tensors, stamps)
        for name, entry in linears.items():
            checkpoint._check_shapes(name, entry)
        return checkpoint

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(size for size, _, _ in self._stamps.values())

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return self.tensors.names()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises CheckpointError when it is missing."""
        return self.tensors.file_of(name)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            CheckpointError: it is missing, or its file is not the one that was opened.
        """
        self._used.add(name)
        file = self.tensors.file_of(name)
        if _stamp(file) != self._stamps[file]:
            raise CheckpointError(f"{file} was changed while it was being read", "try again")
        return self.tensors.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it. Raises CheckpointError when it is missing."""
        return self.tensors.shape(name)

    def linear_shape(self, prefix: str, transposed: bool = False) -> tuple[int, int]:
        """(N, K) of a linear, however it is stored, without reading it.

        `transposed` says that one which is not packed is stored as [K, N].
        """
        if prefix in self.linears:
            return self.linears[prefix].shape
        shape = self.shape(f"{prefix}.weight")
        if len(shape) != 2:
            raise CheckpointError(f"tensor {prefix}.weight is not a matrix: {list(shape)}")
        rows, columns = reversed(shape) if transposed else shape
        return rows, columns

    def linear(self, prefix: str, transposed: bool = False) -> PackedLinear:
        """A linear's weight in the format it is stored in, proved to be legal; see above."""
        entry = self.linears.get(prefix)
        if entry is None:
            weight = self.tensor(f"{prefix}.weight")
            dense = Dense(weight.T.contiguous() if transposed else weight)
            dense.validate(prefix)
            return dense
        suffixes = FORMATS[entry.format].suffixes
        parts = {suffix: self.tensor(f"{prefix}.{suffix}") for suffix in suffixes}
        return from_tensors(entry.format, parts, entry.shape, entry.group, prefix)

    def warn_of_unused(self) -> None:
        """Log the tensors that nothing asked for: they are not part of the model that runs."""
        unused = [n for n in self.names() if n not in self._used and not is_ignored(n)]
        if unused:
            _log.warning(
                "%s: %d unexpected tensors are not used, such as %s",
                self.path,
                len(unused),
                unused[0],
            )

    def _check_shapes(self, name: str, entry: LinearFormat) -> None:
        for suffix, shape in expected_tensors(entry.format, entry.shape, entry.group).items():
            found = self.tensors.shape(f"{name}.{suffix}")
            if found != shape:
                raise CheckpointError(
                    f"tensor {name}.{suffix}: config.json says {list(shape)}, "
                    f"found {list(found)} in {self.tensors.file_of(f'{name}.{suffix}').name}"
                )


def _refuse_links_out(directory: Path) -> None:
    """A link may lead within the directory or, as in the hub's cache, to a blob two levels up."""
    home, blobs = directory.resolve(), (directory.resolve() / ".." / ".." / "blobs").resolve()
    for entry in sorted(directory.iterdir()):
        try:
            target = entry.resolve()
        except (OSError, RuntimeError) as error:  # of a loop, before Python 3.13, the latter
            raise RefusedError(f"{entry} is a link that leads nowhere") from error
        if home not in target.parents and target.parent != blobs:
            raise RefusedError(f"{entry} is a link that leads out of the directory")


def check_tied(tensors: ShardedTensors, embedding: str, head: str) -> None:
    """See that a head which is the embedding is not stored as another one.

    Raises:
        CheckpointError: it is; tools disagree on which of the two counts.
    """
    if f"{head}.weight" not in tensors:
        return
    first, second = tensors.read(f"{embedding}.weight"), tensors.read(f"{head}.weight")
    pairs = zip(first.split(_ROWS_COMPARED), second.split(_ROWS_COMPARED), strict=False)
    if first.shape != second.shape or not all(_same(a.float(), b.float()) for a, b in pairs):
        raise CheckpointError(
            f"{tensors.directory}: config.json says that {head} is {embedding}, and the files hold "
            "two that differ",
            'if the head is one of its own, set "tie_word_embeddings": false in config.json',
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _stamp(file: Path) -> tuple[int, int, int]:
    """Size, time of change and identity: another one means another file under the same name."""
    try:
        stat = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} is missing") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _refuse_foreign(directory: Path, config: Mapping[str, Any]) -> None:
    if asks_for_own_code(config):
        raise RefusedError(
            f"{directory / 'config.json'} has an auto_map: code from a checkpoint is never run"
        )
    for key in _FOREIGN_KEYS:
        if key in config:
            raise RefusedError(
                f"{directory / 'config.json'} has a {key}: another tool's compressed format",
                "start from the uncompressed checkpoint",
            )


def _read_manifest(directory: Path, packed: bool) -> Manifest | None:
    there = (directory / MANIFEST_FILE).exists()
    if packed and not there:
        raise _incomplete(directory)
    return Manifest.read(directory) if there else None


def _incomplete(directory: Path) -> CheckpointError:
    return CheckpointError(
        f"{directory} is incomplete: its pruning run has not finished",
        "run the same halfweave prune command with --resume",
    )


def _check_files(
    directory: Path, manifest: Manifest, tensors: ShardedTensors, verify: bool
) -> None:
    unlisted = sorted({file.name for file in tensors.files} - manifest.files.keys())
    if unlisted:
        raise CheckpointError(f"{directory / unlisted[0]} is not in {MANIFEST_FILE}")
    if verify:
        manifest.check_hashes(directory)
